"""A rank with a critic, inside the test's own process; and the trainer with one or two of them."""

import asyncio
import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from flash.fakes import fake_sample
from flash.trainer.advantage_settings import Gae
from flash.trainer.config import CriticConfig, TrainerConfig
from flash.trainer.objectives.settings import KlSettings, Ppo, Vanilla
from flash.trainer.packing import divide
from flash.trainer.rank import Rank
from flash.trainer.scorer import packed_inputs
from flash.trainer.trainer import Trainer
from flash.trainer.values import trained, with_values
from flash.types import Batch, Sample
from tests.saved import save

SamplesOf = Callable[..., list[Sample]]
SaveModel = Callable[..., Path]
Model: Any = AutoModelForCausalLM


@pytest.fixture
def model(save_model: SaveModel, tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def config_of(**changes: Any) -> TrainerConfig:
    settings = {
        "advantages": Gae(gamma=0.9, lam=0.8),
        "critic": CriticConfig(learning_rate=1e-2),
        "learning_rate": 1e-3,
        "warmup_steps": 0,
    }
    return TrainerConfig(**{**settings, **changes})


@contextlib.contextmanager
def started(
    model: Path, tmp_path: Path, config: TrainerConfig, checkpoint: Path | None = None
) -> Iterator[Rank]:
    rank = Rank()
    rank.start(str(model), checkpoint and str(checkpoint), config, 0, 1, None, 0, None)
    try:
        yield rank
    finally:
        dist.destroy_process_group()


def rewarded(samples: list[Sample]) -> list[Sample]:
    return [replace(s, reward=float(s.episode % 3), advantage=0.0) for s in samples]


def step(rank: Rank, samples: list[Sample], config: TrainerConfig, version: int = 0) -> Any:
    """As the trainer does it, in one process."""
    (values,) = rank.values([samples])
    assert isinstance(config.advantages, Gae)
    valued, metrics = with_values(samples, values, config.advantages)
    (share,) = divide(valued, config)
    return {**rank.step(share, version), **metrics}


def valuer_of(rank: Rank) -> Any:
    assert rank._critic is not None
    return rank._critic._valuer


def weights_of(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.full_tensor().detach().clone() for name, p in module.named_parameters()}


def keep_gradients(module: Any, into: dict[str, torch.Tensor], *_: Any) -> None:
    for name, parameter in module.named_parameters():
        into[name] = parameter.grad.full_tensor().clone()


def test_the_first_values_are_zero_and_later_ones_those_of_a_plain_forward_pass(
    model: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    samples, config = rewarded(samples_of(6)), config_of()
    with started(model, tmp_path, config) as rank:
        first = rank.values([samples])
        for _ in range(3):
            step(rank, samples, config)
        weights = weights_of(valuer_of(rank))
        together = rank.values([samples])
        apart = rank.values([samples[:2], [], samples[2:]])
    assert not np.concatenate(first[0]).any()
    plain: Any = Model.from_pretrained(model).base_model
    plain.load_state_dict({n[5:]: w for n, w in weights.items() if n.startswith("body.")})
    for sample, values, alone in zip(samples, together[0], apart[0] + apart[2], strict=True):
        with torch.no_grad():
            hidden = plain(torch.tensor(sample.token_ids)[None]).last_hidden_state[0].double()
        of_states = hidden @ weights["head.weight"][0].double() + weights["head.bias"].double()
        expected = of_states.numpy()[np.flatnonzero(trained(sample)) - 1]
        np.testing.assert_allclose(values, expected, atol=2e-5)
        np.testing.assert_allclose(alone, expected, atol=2e-5)
    assert np.std(np.concatenate(together[0])) > 0.01


def test_loss_metrics_and_gradients_do_not_depend_on_micro_batches_or_order(
    model: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    samples = rewarded(samples_of(9))
    results = []
    for budget, order in [(4096, range(9)), (60, range(9)), (1, range(8, -1, -1))]:
        config = config_of(tokens_per_micro_batch=budget)
        with started(model, tmp_path, config) as rank:
            gradients: dict[str, torch.Tensor] = {}
            step(rank, [samples[i] for i in order], config)  # the head of zeros learns first

            assert rank._critic is not None
            keep = functools.partial(keep_gradients, valuer_of(rank), gradients)
            rank._critic.optimizer.register_step_pre_hook(keep)
            metrics = step(rank, [samples[i] for i in order], config)
            results.append((metrics, gradients))
    for metrics, gradients in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-6, abs=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], atol=1e-6, rtol=0)
    assert all(gradient.any() for gradient in results[0][1].values())


def test_both_losses_are_those_of_an_independent_reference(
    model: Path, tmp_path: Path, samples_of: SamplesOf, reference_logprobs: Any
) -> None:
    samples = rewarded(samples_of(6))
    config = config_of(
        objective=Vanilla(), critic=CriticConfig(clip=0.1), advantages=Gae(gamma=0.9, lam=0.8)
    )
    plain = Model.from_pretrained(model)
    logprobs, advantages = [], []
    for sample in samples:
        (trained_R,) = np.nonzero(trained(sample))
        now = np.array([0.0, *reference_logprobs(plain, sample.token_ids.tolist())])
        logprobs.append(now[trained_R])
        # With values of 0 the advantage is the reward, λγ-discounted; so is the return.
        to_go = np.arange(len(trained_R))[::-1]
        advantages.append(sample.reward * 0.72**to_go)
    returns = np.concatenate(advantages)
    white = (returns - returns.mean()) / returns.std()
    with started(model, tmp_path, config) as rank:
        metrics = step(rank, samples, config)
    assert metrics["loss"] == pytest.approx(-(white * np.concatenate(logprobs)).mean(), rel=1e-4)
    assert metrics["critic/loss"] == pytest.approx((returns**2).mean() / 2, rel=1e-5)
    assert metrics["critic/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert metrics["critic/return_mean"] == pytest.approx(returns.mean())


def test_at_first_the_critic_may_learn_alone(
    model: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    samples = rewarded(samples_of(5))
    config = config_of(critic=CriticConfig(learning_rate=1e-2, warmup_batches=2), mini_batches=2)
    with started(model, tmp_path, config) as rank:
        policy, critic = weights_of(rank._scorer), weights_of(valuer_of(rank))
        alone = [step(rank, samples, config, version) for version in range(2)]
        unchanged = weights_of(rank._scorer)
        taught = weights_of(valuer_of(rank))
        both = step(rank, samples, config, 2)
        learned = weights_of(rank._scorer)
    assert all(torch.equal(policy[name], unchanged[name]) for name in policy)
    assert not torch.equal(critic["head.weight"], taught["head.weight"])
    assert any(not torch.equal(policy[name], learned[name]) for name in policy)
    assert [metrics["learning_rate"] for metrics in (*alone, both)] == [0, 0, 1e-3]
    assert alone[0]["grad_norm"] > 0


def test_a_resumed_run_with_a_critic_equals_one_that_never_stopped_bit_for_bit(
    model: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    config = config_of(mini_batches=2)
    batches = [rewarded(samples_of(6, seed=number)) for number in range(4)]
    with started(model, tmp_path, config) as rank:
        for batch in batches[:2]:
            step(rank, batch, config)
        save(rank, tmp_path / "checkpoint", 2)
        expected = [step(rank, batch, config) for batch in batches[2:]]
        expected_weights = weights_of(valuer_of(rank))
    checkpoint = tmp_path / "checkpoint"
    with started(model, tmp_path, config, checkpoint) as rank:
        assert [step(rank, batch, config) for batch in batches[2:]] == expected
        for name, weight in weights_of(valuer_of(rank)).items():
            assert torch.equal(weight, expected_weights[name]), name


def test_a_resumed_critic_has_the_settings_of_its_new_configuration(
    model: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    samples = rewarded(samples_of(3))
    config = config_of(critic=CriticConfig(learning_rate=1e-2))
    with started(model, tmp_path, config) as rank:
        step(rank, samples, config)
        save(rank, tmp_path / "checkpoint", 1)
    checkpoint = tmp_path / "checkpoint"
    resumed = config_of(critic=CriticConfig(learning_rate=1e-4), weight_decay=0.5, betas=(0.8, 0.9))
    with started(model, tmp_path, resumed, checkpoint) as rank:
        assert rank._critic is not None
        (group,) = rank._critic.optimizer.param_groups
        assert rank._critic.optimizer.state[group["params"][-1]]["exp_avg"].full_tensor().any()
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-4, 0.5, (0.8, 0.9))


def test_a_critic_can_not_go_on_from_a_checkpoint_without_one(
    model: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    plain = TrainerConfig()
    with started(model, tmp_path, plain) as rank:
        save(rank, tmp_path / "checkpoint", 1)
    with pytest.raises(ValueError, match=r"has no critic .*resume from a checkpoint of a run with"):
        Trainer(
            model="none", config=config_of(), run_dir=tmp_path, resume_from=tmp_path / "checkpoint"
        )


def test_a_critic_without_gae_and_a_divergence_it_would_not_know_of_are_refused() -> None:
    with pytest.raises(ValueError, match="name=grpo, which has no critic: leave it out, or use"):
        TrainerConfig(critic=CriticConfig(learning_rate=1.0))
    with pytest.raises(ValueError, match="place=reward with trainer.advantages.name=gae"):
        config_of(kl=KlSettings(coefficient=0.1, place="reward"))


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_two_ranks_with_a_critic_compute_what_one_does_and_one_goes_on_where_two_stopped(
    tmp_path: Path, model: Path, samples_of: SamplesOf
) -> None:
    config = config_of(threads=1)
    two_ranks = config.model_copy(update={"ranks": 2, "tokens_per_micro_batch": 50})
    # The second batch leaves a rank without a sample.
    batches = [
        Batch(samples=rewarded(samples_of(count, version=version)), version=version)
        for version, count in enumerate((7, 1, 5))
    ]

    async def same_step(a: Trainer, b: Trainer, batch: Batch) -> None:
        metrics_a, metrics_b = await asyncio.gather(a.step(batch), b.step(batch))
        del metrics_a["time/train_s"], metrics_b["time/train_s"]
        assert metrics_a == pytest.approx(metrics_b, abs=1e-6, rel=1e-6)
        assert "critic/loss" in metrics_a

    async with (
        Trainer(model=model, config=config, run_dir=tmp_path / "1") as one,
        Trainer(model=model, config=two_ranks, run_dir=tmp_path / "2") as two,
    ):
        for batch in batches[:2]:
            await same_step(one, two, batch)
        await two.save_checkpoint(tmp_path / "saved")
        async with Trainer(
            model=model, config=config, run_dir=tmp_path / "3", resume_from=tmp_path / "saved"
        ) as resumed:
            await same_step(one, resumed, batches[2])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_policy_learns_from_groups_of_one_whose_rewards_only_a_critic_can_compare(
    model: Path, tmp_path: Path
) -> None:
    """Answers of two tokens to one of four prompts; a good one is worth 1, a prompt up to 9."""
    config = config_of(
        objective=Ppo(),
        advantages=Gae(),
        critic=CriticConfig(learning_rate=1e-2, clip=None, warmup_batches=10),
        learning_rate=6e-3,
    )
    rng = torch.Generator().manual_seed(0)
    prompts = torch.tensor([[3, 5], [7, 11], [13, 17], [19, 23]]).repeat(16, 1)
    shares, explained = [], []
    with started(model, tmp_path, config) as rank:
        for version in range(40):
            tokens = prompts
            chosen = []
            with torch.no_grad():
                for _ in range(2):
                    logits = plain_logits(rank, tokens)
                    token = torch.multinomial(logits.softmax(-1), 1, generator=rng)
                    chosen.append(logits.log_softmax(-1).gather(-1, token))
                    tokens = torch.cat([tokens, token], 1)
            good = (tokens[:, 2:] < 48).float().mean(1)
            samples = [
                fake_sample(
                    tokens[i].numpy(),
                    [0, 0, 1, 1],
                    logprobs=np.array([0, 0, *(float(c[i]) for c in chosen)], np.float32),
                    versions=np.array([-1, -1, version, version]),
                    reward=float(good[i]) + 3.0 * (i % 4),
                    episode=i,
                )
                for i in range(len(tokens))
            ]
            explained.append(step(rank, samples, config, version)["critic/explained_variance"])
            shares.append(float(good.mean()))
    assert np.mean(shares[:10]) < 0.6
    assert np.mean(shares[-10:]) > 0.85
    assert np.mean(explained[-10:]) > 0.9


def plain_logits(rank: Rank, tokens_QT: torch.Tensor) -> torch.Tensor:
    """Of the token after each row."""
    count, length = tokens_QT.shape
    scorer = rank._scorer
    scorer.unshard()  # type: ignore[operator]
    inputs = packed_inputs(tokens_QT.flatten(), (length,) * count)
    hidden = scorer.model.base_model(**inputs).last_hidden_state[0]
    logits: torch.Tensor = scorer.model.get_output_embeddings()(hidden[length - 1 :: length])
    scorer.reshard()  # type: ignore[operator]
    return logits
