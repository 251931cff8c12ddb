"""What docs/models.md says of each family of models, on a tiny random one."""

import asyncio
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file

from flash.trainer.config import TrainerConfig
from flash.trainer.export import layout, write_weights
from flash.trainer.loading import sharded_scorer
from flash.trainer.model_files import check_files
from flash.trainer.router_replay import Routers
from flash.trainer.scorer import TokenScorer
from flash.worker.engine import EmbeddedEngine, EngineRequest
from flash.worker.self_test import check_engine
from tests.families import WINDOW, WINDOWS, save_family

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

Model: Any = transformers.AutoModelForCausalLM
PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text()
LENGTHS = (5 * WINDOW, 7, 2, 23)
TEXTS = [
    [(31 * (place + 3) * (number + 2) + 17 * place**2) % 95 + 2 for place in range(length)]
    for number, length in enumerate(LENGTHS)
]
LIMIT = 1e-3


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def listed(title: str) -> list[str]:
    return re.findall(r"`([\w-]+)`", section(title).rpartition("\n\n")[2])


SERVED = listed("Trained, and served by every engine")
TRAINED = listed("Trained, but not served by embedded workers")
REPLAYED = listed("Mixtures of experts")
# Without which they have no experts, or none in so few layers.
WITH_EXPERTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"first_k_dense_replace": 1},
    "gemma4": {"enable_moe_block": True},
    "gemma4_text": {"enable_moe_block": True},
}
REFUSED = [
    (kind, bool(windows), re.findall("`(.+?)`", why))
    for why, kinds in re.findall(r"^\| (`.+`) \| (.+) \|$", section("Not trained"), re.MULTILINE)
    for kind, windows in re.findall(r"`([\w-]+)`( with windows)?", kinds)
]


@torch.no_grad()
def logprobs_of(model: Any, text: Sequence[int]) -> torch.Tensor:
    """Of all but the first token, from a plain forward pass."""
    ids = torch.tensor([text])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    logprobs: torch.Tensor = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return logprobs


def plain(folder: Path) -> Any:
    return Model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def packed_logprobs(scorer: TokenScorer, experts_NR: torch.Tensor | None = None) -> torch.Tensor:
    ids = torch.tensor([token for text in TEXTS for token in text])
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    scored = [torch.arange(end - n + 1, end) for end, n in zip(ends, LENGTHS, strict=True)]
    logprobs: torch.Tensor = scorer(ids, LENGTHS, torch.cat(scored), experts_NR=experts_NR)
    return logprobs


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """The only rank."""
    store: Any = dist
    dist.init_process_group("gloo", store=store.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    engines = []

    def open_engine() -> EmbeddedEngine:
        engine = EmbeddedEngine(
            str(tmp_path), device="cpu", dtype="float32", cache_tokens=512, max_running=4
        )
        engines.append(engine)
        return engine

    yield open_engine
    for engine in engines:
        engine.close()


async def far_off(engine: EmbeddedEngine, reference: Any) -> float:
    """By how much what it samples after all texts at once is, in nats."""
    prompts = [text[: len(text) // 2] for text in TEXTS]
    requests = [
        EngineRequest(request_id=str(number), token_ids=prompt, max_tokens=2 * WINDOW)
        for number, prompt in enumerate(prompts)
    ]
    results = await asyncio.gather(*map(engine.generate, requests))
    return max(
        float((torch.tensor(told) - expected[-len(told) :]).abs().max())
        for prompt, result in zip(prompts, results, strict=True)
        for told in [result.logprobs]
        for expected in [logprobs_of(reference, [*prompt, *result.token_ids])]
    )


def check_training(folder: Path) -> tuple[TokenScorer, Any]:
    """Packed logprobs are the model's own, and nothing in them is random; the trainer's model, as a
    rank has it, and the model."""
    check_files(str(folder), field="model")
    scorer = sharded_scorer(str(folder), TrainerConfig(), device="cpu", half=False)
    reference = plain(folder)
    expected = torch.cat([logprobs_of(reference, text) for text in TEXTS])
    packed = packed_logprobs(scorer)
    assert packed.requires_grad
    torch.testing.assert_close(packed, expected, atol=LIMIT, rtol=0)
    assert torch.equal(packed, packed_logprobs(scorer))
    return scorer, reference


@pytest.mark.parametrize("kind", SERVED)
async def test_a_family_is_trained_served_and_exported_as_it_is(
    kind: str, tmp_path: Path, opened: Any
) -> None:
    save_family(tmp_path, kind)
    scorer, reference = check_training(tmp_path)

    out = tmp_path / "out"
    out.mkdir()
    exported: Any = scorer.model
    write_weights(exported, out, dtype=torch.float32, write=True)
    written, expected = weights_in(out), weights_in(tmp_path)
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    told = {name: (dtype, shape) for name, dtype, shape in layout(exported, torch.float32)}
    assert told == {name: (tensor.dtype, tensor.shape) for name, tensor in written.items()}
    again = plain(out)
    for text in TEXTS:
        assert torch.equal(logprobs_of(again, text), logprobs_of(reference, text))

    engine = opened()
    await check_engine(engine)
    assert await far_off(engine, reference) < LIMIT
    with torch.no_grad():
        for parameter in exported.parameters():
            parameter.mul_(1.2)
    write_weights(exported, out, dtype=torch.float32, write=True)
    await engine.pause("keep")
    engine.load_weights(out)
    await engine.resume()
    assert await far_off(engine, plain(out)) < LIMIT


@pytest.mark.parametrize("kind", TRAINED)
async def test_a_family_that_embedded_workers_do_not_serve_is_trained_and_vllm_named(
    kind: str, tmp_path: Path, opened: Any
) -> None:
    save_family(tmp_path, kind)
    check_training(tmp_path)
    with pytest.raises(
        ValueError, match=f"model_type='{kind}' can't be served by an emb.*: have vLLM do it"
    ):
        await check_engine(opened())


@torch.no_grad()
@pytest.mark.parametrize("kind", REPLAYED)
def test_a_mixture_of_experts_takes_those_that_others_chose(kind: str, tmp_path: Path) -> None:
    """In its packed sequences those of a forward pass of each are what its own routers choose."""
    save_family(tmp_path, kind, **WITH_EXPERTS.get(kind, {}))
    check_files(str(tmp_path), field="model", replays=True)
    scorer = sharded_scorer(str(tmp_path), TrainerConfig(), device="cpu", half=False, replays=True)
    reference = plain(tmp_path)
    routers = Routers(reference)
    experts = []
    for text in TEXTS:
        reference(input_ids=torch.tensor([text]), use_cache=False)
        experts.append(routers.chosen())
    own = packed_logprobs(scorer)
    replayed = packed_logprobs(scorer, torch.cat(experts))
    torch.testing.assert_close(replayed, own, atol=LIMIT, rtol=0)
    assert scorer.routers is not None
    differing_N, known_N = scorer.routers.differing()
    assert known_N.all() and not differing_N.any()
    others = packed_logprobs(scorer, scorer.routers.others())
    assert (others - own).abs().max() > 10 * LIMIT
    assert scorer.routers.differing()[0].any()


@pytest.mark.parametrize(("kind", "windows", "why"), REFUSED)
def test_a_family_that_can_not_be_trained_is_refused_by_name_before_anything_is_started(
    kind: str, windows: bool, why: list[str], tmp_path: Path
) -> None:
    config = save_family(tmp_path, kind, **(WINDOWS[kind] if windows else {}))
    named = f"model_type='{config.model_type}"
    with pytest.raises(ValueError, match=named) as caught:
        check_files(str(tmp_path), field="model")
    for part in why:
        assert part in str(caught.value)


def test_no_family_is_in_two_lists() -> None:
    kinds = [*SERVED, *TRAINED, *(kind for kind, windows, _ in REFUSED if not windows)]
    assert len(kinds) == len(set(kinds))
    assert set(REPLAYED) <= {*SERVED, *TRAINED} and len(REPLAYED) > 20
    assert len(SERVED) > 50 and len(TRAINED) > 10 and len(REFUSED) > 70
