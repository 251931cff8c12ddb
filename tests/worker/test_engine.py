"""The embedded engine: logprobs, versions, and weights that change under running requests."""

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from flash.worker.engine import EmbeddedEngine, EngineDied, EngineRequest

pytestmark = pytest.mark.slow

PROMPT = list(range(5, 45))


def make_model(folder: Path, seed: int, *, tied: bool = True, shape=LlamaConfig) -> Path:
    torch.manual_seed(seed)
    config = shape(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4000,
        tie_word_embeddings=tied, eos_token_id=2, pad_token_id=0, bos_token_id=None,
        initializer_range=0.2,  # far from uniform, so that wrong weights show
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def sliding(**options) -> Qwen2Config:
    return Qwen2Config(
        **options, use_sliding_window=True, sliding_window=16, max_window_layers=1,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip


def logprobs_of(model: Path, prompt, sampled, temperature: float = 1.0) -> list[float]:
    """By a plain forward pass, without any cache."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    token_ids = torch.tensor([[*prompt, *sampled]])
    with torch.no_grad():
        logits = loaded(token_ids).logits[0, len(prompt) - 1 : -1] / temperature
    picked = logits.log_softmax(-1).gather(-1, token_ids[0, len(prompt) :, None])
    return picked[:, 0].tolist()


class Engines:
    """Opens engines and closes them."""

    def __init__(self) -> None:
        self.opened: list[EmbeddedEngine] = []

    def __call__(self, model: Path, **options) -> EmbeddedEngine:
        settings = {"cache_tokens": 4096, "max_running": 64, "seed": 0, **options}
        engine = EmbeddedEngine(str(model), device="cpu", dtype="float32", **settings)
        self.opened.append(engine)
        return engine


@pytest.fixture
def engines():
    opened = Engines()
    yield opened
    for engine in opened.opened:
        engine.close()


def request(name="r", prompt=PROMPT, max_tokens=8, **options) -> EngineRequest:
    return EngineRequest(request_id=name, token_ids=prompt, max_tokens=max_tokens, **options)


@pytest.mark.parametrize("shape", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_logprobs_are_those_of_a_plain_forward_pass(
    engines, tmp_path, shape, tied, temperature
):
    model = make_model(tmp_path / "m", 1, tied=tied, shape=shape)
    engine = engines(model)
    result = await engine.generate(request(temperature=temperature))
    assert result.spans == [(0, 0, 8)]
    expected = logprobs_of(model, PROMPT, result.token_ids, temperature)
    assert result.logprobs == pytest.approx(expected, abs=1e-4)


async def test_many_requests_at_once_are_each_answered_with_their_own(engines, tmp_path):
    model = make_model(tmp_path / "m", 1)
    engine = engines(model)
    prompts = {f"r{n}": [5 + (n * k) % 100 for k in range(1, 6 + n % 7)] for n in range(64)}
    results = await asyncio.gather(*(engine.generate(request(n, p)) for n, p in prompts.items()))
    assert engine.running == 0
    for prompt, result in list(zip(prompts.values(), results, strict=True))[::8]:
        expected = logprobs_of(model, prompt, result.token_ids)
        assert result.logprobs == pytest.approx(expected, abs=1e-4)


async def test_prompts_that_take_several_steps_and_share_a_prefix_are_attended_to_whole(
    engines, tmp_path
):
    """Longer than one step's tokens, then with most of its keys and values there already."""
    model = make_model(tmp_path / "m", 1)
    engine = engines(model, cache_tokens=8192)
    long = [5 + (n * n) % 100 for n in range(2500)]
    requests = [request("a", long), request("b", long[:1000])]
    results = await asyncio.gather(*map(engine.generate, requests))
    requests.append(request("c", [*long, *range(5, 45)]))
    results.append(await engine.generate(requests[-1]))
    for asked, result in zip(requests, results, strict=True):
        expected = logprobs_of(model, asked.token_ids, result.token_ids)
        assert result.logprobs == pytest.approx(expected, abs=1e-4)


async def test_a_model_whose_layers_do_not_see_everything_keeps_the_masked_attention(
    engines, tmp_path
):
    model = make_model(tmp_path / "m", 1, shape=sliding)
    engine = engines(model)
    assert engine._model.config._attn_implementation == "sdpa"
    result = await engine.generate(request())
    expected = logprobs_of(model, PROMPT, result.token_ids)
    assert result.logprobs == pytest.approx(expected, abs=1e-4)


WINDOWS = [
    ("mistral", {"sliding_window": 8}),
    ("phi3", {"sliding_window": 8}),
    ("starcoder2", {"sliding_window": 8}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 8}),
    ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 2, "head_dim": 8}),
]


@pytest.mark.parametrize(("kind", "settings"), WINDOWS)
async def test_a_window_is_kept_in_whatever_way_a_configuration_says_it(
    engines, tmp_path, kind, settings
):
    def shape(**sizes):
        return AutoConfig.for_model(kind, **sizes, **settings)

    model = make_model(tmp_path / "m", 1, shape=shape)
    engine = engines(model)
    results = await asyncio.gather(
        engine.generate(request("long")), engine.generate(request("short", PROMPT[:3]))
    )
    for prompt, result in zip((PROMPT, PROMPT[:3]), results, strict=True):
        expected = logprobs_of(model, prompt, result.token_ids)
        assert result.logprobs == pytest.approx(expected, abs=1e-4)


async def test_a_stop_token_ends_the_response_and_is_its_last_token(engines, tmp_path):
    engine = engines(make_model(tmp_path / "m", 1))
    stops = list(range(0, 128, 2))
    result = await engine.generate(request(max_tokens=100, stop_token_ids=stops))
    assert result.finish_reason == "stop"
    assert result.token_ids[-1] in stops
    assert not set(result.token_ids[:-1]) & set(stops)
    whole = await engine.generate(request(max_tokens=5))
    assert (whole.finish_reason, len(whole.token_ids)) == ("length", 5)


async def test_temperature_zero_is_greedy(engines, tmp_path):
    model = make_model(tmp_path / "m", 1)
    result = await engines(model).generate(request(temperature=0.0, max_tokens=5))
    loaded = AutoModelForCausalLM.from_pretrained(model)
    token_ids = list(PROMPT)
    for _ in range(5):
        token_ids.append(int(loaded(torch.tensor([token_ids])).logits[0, -1].argmax()))
    assert result.token_ids == token_ids[len(PROMPT) :]


async def started(engine: EmbeddedEngine, name: str) -> None:
    """Waits until the request has sampled something."""
    while not engine._sampled_so_far(name)[0]:
        await asyncio.sleep(0)


async def swap(engine: EmbeddedEngine, model: Path, version: int, mode: str = "keep") -> None:
    await engine.pause(mode)
    engine.load_weights(model)
    engine.set_version(version)
    await engine.resume()


async def test_a_request_that_lives_across_a_swap_reports_both_versions(engines, tmp_path):
    old, new = make_model(tmp_path / "old", 1), make_model(tmp_path / "new", 2)
    engine = engines(old)
    running = asyncio.ensure_future(engine.generate(request("long", max_tokens=400)))
    await started(engine, "long")
    await swap(engine, new, 1)
    result = await running
    (first, zero, seam), (second, start, end) = result.spans
    assert (first, zero, second, start, end) == (0, 0, 1, seam, 400)
    assert 0 < seam < 400
    before = logprobs_of(old, PROMPT, result.token_ids[:seam])
    assert result.logprobs[:seam] == pytest.approx(before, abs=1e-4)
    # Behind the seam keys and values of the old weights are still attended to, by design; so the
    # new weights show only in that the old ones do not explain the tokens any more.
    after = logprobs_of(old, PROMPT, result.token_ids)[seam:]
    assert max(abs(a - b) for a, b in zip(after, result.logprobs[seam:], strict=True)) > 0.1


@pytest.mark.parametrize("tied", [True, False])
async def test_a_new_request_after_a_swap_uses_the_new_weights_alone(engines, tmp_path, tied):
    """Also while an old request lives on whose prefix it shares."""
    old, new = (make_model(tmp_path / str(seed), seed, tied=tied) for seed in (1, 2))
    engine = engines(old)
    await engine.generate(request("before"))
    survivor = asyncio.ensure_future(engine.generate(request("survivor", max_tokens=400)))
    await started(engine, "survivor")
    await swap(engine, new, 1)
    for name in ("after", "again"):
        result = await engine.generate(request(name))
        assert result.spans == [(1, 0, 8)]
        expected = logprobs_of(new, PROMPT, result.token_ids)
        assert result.logprobs == pytest.approx(expected, abs=1e-4)
    longer = [*PROMPT, *(await survivor).token_ids[:64]]
    result = await engine.generate(request("extends the survivor", longer))
    expected = logprobs_of(new, longer, result.token_ids)
    assert result.logprobs == pytest.approx(expected, abs=1e-4)


async def test_abort_answers_with_what_there_is(engines, tmp_path):
    model = make_model(tmp_path / "m", 1)
    engine = engines(model)
    running = asyncio.ensure_future(engine.generate(request("r", max_tokens=2000)))
    await started(engine, "r")
    assert engine.abort("r")
    result = await running
    assert result.finish_reason == "abort"
    assert 0 < len(result.token_ids) == len(result.logprobs) < 2000
    expected = logprobs_of(model, PROMPT, result.token_ids)
    assert result.logprobs == pytest.approx(expected, abs=1e-4)
    assert not engine.abort("r")


async def test_pausing_with_abort_answers_all_and_goes_on_after_resume(engines, tmp_path):
    engine = engines(make_model(tmp_path / "m", 1))
    running = [
        asyncio.ensure_future(engine.generate(request(f"r{n}", max_tokens=2000))) for n in range(3)
    ]
    await started(engine, "r0")
    await engine.pause("abort")
    results = await asyncio.gather(*running)
    assert {result.finish_reason for result in results} == {"abort"}
    waiting = asyncio.ensure_future(engine.generate(request("next")))
    await engine.resume()
    assert (await waiting).finish_reason == "length"


async def test_pausing_with_wait_lets_requests_end_and_holds_new_ones(engines, tmp_path):
    engine = engines(make_model(tmp_path / "m", 1))
    running = asyncio.ensure_future(engine.generate(request("r", max_tokens=60)))
    await started(engine, "r")
    pausing = asyncio.ensure_future(engine.pause("wait"))
    await asyncio.sleep(0)
    late = asyncio.ensure_future(engine.generate(request("late")))
    await pausing
    assert running.done()
    assert not late.done()
    engine.set_version(1)
    await engine.resume()
    assert (await running).spans == [(0, 0, 60)]
    assert (await late).spans == [(1, 0, 8)]


async def test_a_cancelled_caller_frees_its_place(engines, tmp_path):
    engine = engines(make_model(tmp_path / "m", 1), max_running=1)
    running = asyncio.ensure_future(engine.generate(request("r", max_tokens=3000)))
    await started(engine, "r")
    running.cancel()
    assert (await engine.generate(request("next"))).finish_reason == "length"
    assert engine.running == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(prompt=[]), "token_ids is empty"),
        (request(prompt=[128]), "token_ids must lie in 0 … 127"),
        (request(max_tokens=0), "max_tokens=0"),
        (request(temperature=-1.0), "temperature=-1.0"),
        (request(temperature=float("nan")), "temperature=nan"),
        (request(max_tokens=5000), "more than the cache's 4096"),
        (request(max_tokens=4000), "more than the model's 4000 positions"),
    ],
)
async def test_a_request_that_cannot_be_is_refused_by_field(engines, tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        await engines(make_model(tmp_path / "m", 1)).generate(bad)


async def test_weights_that_do_not_fit_are_refused_and_nothing_changes(engines, tmp_path):
    model = make_model(tmp_path / "m", 1)
    engine = engines(model)
    (tmp_path / "empty").mkdir()
    (tmp_path / "part").mkdir()
    save_file({"lm_head.weight": torch.zeros(3, 3)}, tmp_path / "part" / "model.safetensors")
    other = make_model(tmp_path / "wide", 2)
    tensors = load_file(other / "model.safetensors")
    tensors[max(tensors)] = torch.zeros(3, 3)  # the last one: all others would fit
    save_file(tensors, other / "model.safetensors")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"half of a file")
    await engine.pause("keep")
    refusals = {
        "empty": "no safetensors", "part": "lacks weights", "wide": "not the model",
        "torn": "torn.*can't be read",
    }  # fmt: skip
    for folder, message in refusals.items():
        with pytest.raises(ValueError, match=message):
            engine.load_weights(tmp_path / folder)
    await engine.resume()
    result = await engine.generate(request())
    expected = logprobs_of(model, PROMPT, result.token_ids)
    assert result.logprobs == pytest.approx(expected, abs=1e-4)


async def test_the_same_weights_again_change_nothing_but_the_version(engines, tmp_path):
    """So the swap itself is exact: every logprob of the response, on both sides of the seams."""
    model = make_model(tmp_path / "m", 1)
    engine = engines(model)
    running = asyncio.ensure_future(engine.generate(request("long", max_tokens=300)))
    await started(engine, "long")
    await swap(engine, model, 1)
    await swap(engine, model, 2)
    result = await running
    versions, starts, ends = zip(*result.spans, strict=True)
    assert (versions[0], versions[-1]) == (0, 2)
    assert starts == (0, *ends[:-1])
    expected = logprobs_of(model, PROMPT, result.token_ids)
    assert result.logprobs == pytest.approx(expected, abs=1e-4)


async def test_an_engine_that_fails_ends_its_requests_with_the_cause(engines, tmp_path):
    engine = engines(make_model(tmp_path / "m", 1))
    running = asyncio.ensure_future(engine.generate(request("r", max_tokens=3000)))
    await started(engine, "r")

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    engine._model.forward = fail
    with pytest.raises(EngineDied, match="out of memory"):
        await running
    await asyncio.to_thread(engine._manager._generation_thread.join)
    assert not engine.alive
    with pytest.raises(EngineDied, match="out of memory"):
        await engine.generate(request("next"))


async def test_closing_a_paused_engine_ends_its_requests(engines, tmp_path):
    engine = engines(make_model(tmp_path / "m", 1))
    running = asyncio.ensure_future(engine.generate(request("r", max_tokens=3000)))
    await started(engine, "r")
    await engine.pause("keep")
    engine.close()
    engines.opened.remove(engine)
    with pytest.raises(EngineDied):
        await running


def test_a_model_is_loaded_without_a_bar(engines, tmp_path, capfd):
    model = make_model(tmp_path, 0)
    capfd.readouterr()
    engines(model)
    assert "Loading weights" not in capfd.readouterr().err


@pytest.mark.parametrize("config", ["{}", '{"model_type": "llama"}'])
def test_a_model_that_can_not_be_had_is_one_line_that_says_what_to_do(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="can't be loaded: check its name") as caught:
        EmbeddedEngine(str(tmp_path), device="cpu", dtype="float32", cache_tokens=64, max_running=1)
    assert "\n" not in str(caught.value)
