from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3NextConfig

from flash.trainer.attention import PACKED_ATTENTION, Packing
from flash.trainer.scorer import TokenScorer

LENGTHS = (7, 1, 30, 2, 12)
SaveModel = Callable[..., Path]
Reference = Callable[[Any, list[int]], list[float]]
Model: Any = AutoModelForCausalLM


@pytest.fixture(params=["llama", "qwen2"])
def directory(request: pytest.FixtureRequest, save_model: SaveModel, tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", request.param, tied=request.param == "llama")


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of five sequences, and the indices of all that have a logprob."""
    token_ids_N = torch.tensor(np.random.default_rng(1).integers(0, 97, sum(LENGTHS)))
    firsts = np.cumsum([0, *LENGTHS[:-1]])
    return token_ids_N, torch.tensor(np.setdiff1d(np.arange(sum(LENGTHS)), firsts))


def load(directory: Path) -> Any:
    return Model.from_pretrained(directory, attn_implementation=PACKED_ATTENTION)


def test_a_packed_sequence_scores_as_it_does_alone(
    directory: Path, reference_logprobs: Reference
) -> None:
    token_ids_N, scored_T = packed()
    logprobs_T = TokenScorer(load(directory))(token_ids_N, LENGTHS, scored_T)
    plain = Model.from_pretrained(directory, attn_implementation="eager")
    alone = [
        logprob
        for sequence in token_ids_N.split(list(LENGTHS))
        for logprob in reference_logprobs(plain, sequence.tolist())
    ]
    np.testing.assert_allclose(logprobs_T.detach().numpy(), alone, atol=2e-5)


@pytest.mark.gpu
def test_on_a_gpu_packed_sequences_score_in_bfloat16_as_well_as_alone(
    directory: Path, reference_logprobs: Reference
) -> None:
    token_ids_N, scored_S = packed()
    exact_S = TokenScorer(load(directory))(token_ids_N, LENGTHS, scored_S).detach()
    settings = {"dtype": torch.bfloat16, "attn_implementation": PACKED_ATTENTION}
    on_gpu = TokenScorer(Model.from_pretrained(directory, **settings).cuda())
    packed_S = on_gpu(token_ids_N.cuda(), LENGTHS, scored_S.cuda()).detach().cpu()
    plain = Model.from_pretrained(directory, attn_implementation="eager", dtype=torch.bfloat16)
    alone_S = torch.tensor(
        [
            logprob
            for sequence in token_ids_N.split(list(LENGTHS))
            for logprob in reference_logprobs(plain, sequence.tolist())
        ]
    )
    assert (packed_S - exact_S).abs().mean() < 2 * (alone_S - exact_S).abs().mean()


def test_only_the_tokens_asked_for_are_scored_in_their_order(directory: Path) -> None:
    token_ids_N, scored_T = packed()
    scorer = TokenScorer(load(directory))
    all_T = scorer(token_ids_N, LENGTHS, scored_T)
    chosen = torch.tensor([40, 3, 17])
    some_T = scorer(token_ids_N, LENGTHS, scored_T[chosen])
    torch.testing.assert_close(some_T, all_T[chosen])


def test_no_tokens_asked_for_still_reach_every_weight(directory: Path) -> None:
    token_ids_N, _ = packed()
    scorer = TokenScorer(load(directory))
    scorer(token_ids_N, LENGTHS, torch.zeros(0, dtype=torch.long)).sum().backward()
    for name, parameter in scorer.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_logits_computed_again_in_chunks_give_the_same_logprobs_and_gradients(
    directory: Path,
) -> None:
    token_ids_N, scored_T = packed()
    results = []
    for kept_logits in (1_000_000, 5 * 97):
        scorer = TokenScorer(load(directory), kept_logits=kept_logits)
        logprobs_T = scorer(token_ids_N, LENGTHS, scored_T)
        logprobs_T.sum().backward()
        results.append((logprobs_T, [p.grad for p in scorer.parameters()]))
    torch.testing.assert_close(results[0], results[1])


def test_a_window_of_attention_is_kept(tmp_path: Path, reference_logprobs: Reference) -> None:
    config = MistralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
        initializer_range=0.3,
    )
    Model.from_config(config).save_pretrained(tmp_path)
    token_ids_N, scored_T = packed()
    logprobs_T = TokenScorer(load(tmp_path))(token_ids_N, LENGTHS, scored_T)
    plain = Model.from_pretrained(tmp_path, attn_implementation="eager")
    alone = reference_logprobs(plain, token_ids_N[8:38].tolist())
    np.testing.assert_allclose(logprobs_T[6:35].detach().numpy(), alone, atol=2e-5)
    without = Model.from_pretrained(tmp_path, sliding_window=None, attn_implementation="eager")
    unlimited = reference_logprobs(without, token_ids_N[8:38].tolist())
    assert np.abs(np.subtract(unlimited, alone)).max() > 0.01


def test_a_model_that_carries_state_across_packed_sequences_is_refused() -> None:
    config = Qwen3NextConfig(num_hidden_layers=4)
    assert "linear_attention" in config.layer_types
    holder = torch.nn.Module()
    holder.config = config  # type: ignore[assignment]
    with pytest.raises(ValueError, match="linear_attention"):
        TokenScorer(holder)


def test_an_attention_that_is_not_done_here_is_refused(tmp_path: Path) -> None:
    model = Model.from_config(
        LlamaConfig(
            vocab_size=9,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        ),
        attn_implementation=PACKED_ATTENTION,
    )
    with pytest.raises(ValueError, match="softcap"):
        model(torch.tensor([[1, 2]]), packing=Packing.of((2,), "cpu"), softcap=30.0)


@pytest.mark.parametrize("kept_logits", [10**9, 5 * 97])
def test_temperature_and_entropy_are_those_of_the_distribution_that_is_sampled(
    kept_logits: int, directory: Path
) -> None:
    scored_by, plain = load(directory), Model.from_pretrained(directory)
    token_ids, scored_T = torch.arange(20), torch.arange(3, 20)
    temperatures_T = torch.linspace(0.5, 2.0, 17)
    logprobs_T, entropy_T = TokenScorer(scored_by, kept_logits=kept_logits)(
        token_ids, (20,), scored_T, temperatures_T=temperatures_T, with_entropy=True
    )
    logits_TV = plain(token_ids[None]).logits[0, scored_T - 1].double()
    expected_TV = (logits_TV / temperatures_T[:, None]).log_softmax(-1)
    chosen_T = expected_TV.gather(-1, token_ids[scored_T, None])[:, 0]
    torch.testing.assert_close(logprobs_T.double(), chosen_T, atol=2e-5, rtol=0)
    expected_T = -(expected_TV.exp() * expected_TV).sum(-1)
    torch.testing.assert_close(entropy_T.double(), expected_T, atol=2e-5, rtol=0)
    (found,) = torch.autograd.grad(entropy_T.sum(), scored_by.get_output_embeddings().weight)
    (expected,) = torch.autograd.grad(expected_T.sum(), plain.get_output_embeddings().weight)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
