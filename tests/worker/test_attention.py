"""The way that a GPU takes through the embedded engine, with references in the kernels' places."""

import asyncio
import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen2Config

from flash.trainer.attention import VarlenKernel
from flash.trainer.router_replay import Routers
from flash.worker import attention
from flash.worker.attention import GpuKernels, use_kernels
from flash.worker.engine import EmbeddedEngine, EngineRequest
from tests.varlen import varlen

PAGE = 16


def in_pages(
    query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, *, keys: Tensor, values: Tensor,
    pages: Tensor, queries: Tensor, ends: Tensor, unused: int, scale: float,
) -> Tensor:  # fmt: skip
    """What `flash.worker.paged.attend_in_pages` says that it computes."""
    attended = torch.zeros_like(query_NHD)
    page = keys.shape[1]
    keys_NGD, values_NGD = keys.flatten(0, 1), values.flatten(0, 1)
    filled = queries[-1]
    keys_NGD[unused], values_NGD[unused] = key_NGD[filled:].sum(0), value_NGD[filled:].sum(0)
    one_each = len(query_NHD) == len(queries) - 1
    lengths = zip(itertools.pairwise(queries.tolist()), ends.diff().tolist(), strict=True)
    for number, ((start, end), length) in enumerate(lengths):
        assert end - start <= (1 if one_each else length)
        place = torch.arange(length)
        tokens = pages[number, place // page].long() * page + place % page
        new = tokens[length - (end - start) :]
        keys_NGD[new], values_NGD[new] = key_NGD[start:end], value_NGD[start:end]
        if end > start:
            allowed = torch.ones(end - start, length, dtype=torch.bool)
            attended[start:end] = scaled_dot_product_attention(
                query_NHD[start:end].transpose(0, 1)[None],
                *(tensor[tokens].transpose(0, 1)[None] for tensor in (keys_NGD, values_NGD)),
                attn_mask=allowed.tril(length - (end - start)), scale=scale, enable_gqa=True,
            )[0].transpose(0, 1)  # fmt: skip
    return attended


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Engines take the GPU's way; how often each kernel was called."""
    counted = {"varlen": 0, "in_pages": 0}

    def counting(name, call, *tensors, **settings):
        counted[name] += 1
        return call(*tensors, **settings)

    kernels = GpuKernels(
        VarlenKernel(partial(counting, "varlen", varlen), told=True),
        partial(counting, "in_pages", in_pages),
    )

    def use(model, manager, *, longest, graphs):
        use_kernels(model, manager, kernels, longest=longest, graphs=False)

    monkeypatch.setattr(attention, "use", use)
    return counted


@pytest.fixture(params=[False, True], ids=["as it is", "padded"])
def opened(request: pytest.FixtureRequest):
    """Opens engines whose steps have as many tokens as there are, or as many as a graph has."""
    engines = []

    def opened(model: Path, **settings) -> EmbeddedEngine:
        engine = EmbeddedEngine(
            str(model), device="cpu", dtype="float32", cache_tokens=8192, max_running=8, **settings
        )
        engines.append(engine)
        engine._manager.batch_processor.model_runner.pad_inputs = request.param
        return engine

    yield opened
    for engine in engines:
        engine.close()


def made(folder: Path, shape=LlamaConfig, seed: int = 1, **settings) -> Path:
    torch.manual_seed(seed)
    config = shape(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4000,
        eos_token_id=2, pad_token_id=0, bos_token_id=None, initializer_range=0.2, **settings,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


async def sampled(engine: EmbeddedEngine, name: str, prompt: list[int], new: int = 20):
    request = EngineRequest(request_id=name, token_ids=prompt, max_tokens=new, temperature=0.7)
    return await engine.generate(request)


def check(model: Path, prompt: list[int], result) -> None:
    """Its logprobs are those of a plain forward pass, without any cache."""
    token_ids = torch.tensor([[*prompt, *result.token_ids]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(token_ids).logits[0]
    logprobs = (logits[len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
    expected = logprobs.gather(-1, token_ids[0, len(prompt) :, None])[:, 0].tolist()
    assert result.logprobs == pytest.approx(expected, abs=1e-4)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [5 + (n * n + seed) % 100 for n in range(length)]


async def test_steps_of_one_token_each_read_the_pages(calls, opened, tmp_path):
    model = made(tmp_path / "m")
    engine = opened(model)
    prompts = [prompt_of(length, length) for length in (1, 15, 16, 17, 40, 100)]
    results = await asyncio.gather(*(sampled(engine, str(len(p)), p) for p in prompts))
    for prompt, result in zip(prompts, results, strict=True):
        check(model, prompt, result)
    assert (calls["in_pages"] > 0, calls["varlen"]) == (True, 0)


async def test_the_experts_of_tokens_in_pages_are_those_of_a_forward_pass(calls, opened, tmp_path):
    model = made(tmp_path / "m", MixtralConfig, num_local_experts=4, sliding_window=None)
    engine = opened(model, routed_experts=True)
    prompts = [prompt_of(length) for length in (3, 40, 100)]  # each begins as the next does
    results = [await sampled(engine, "first", prompts[2])]
    results += await asyncio.gather(*(sampled(engine, str(len(p)), p) for p in prompts))
    reference = AutoModelForCausalLM.from_pretrained(model)
    routers = Routers(reference)
    for prompt, result in zip([prompts[2], *prompts], results, strict=True):
        with torch.no_grad():
            reference(torch.tensor([[*prompt, *result.token_ids]]))
        own, told = (
            np.sort(experts.reshape(-1, 2, 2), -1)
            for experts in (routers.chosen().numpy()[:-1], result.experts)
        )
        np.testing.assert_array_equal(told, own)
    assert calls["in_pages"] > 0


async def test_long_prompts_and_shared_ones_are_attended_to_whole(calls, opened, tmp_path):
    """Longer than one step's tokens, beside one that samples, and with a prefix that is there."""
    model = made(tmp_path / "m")
    engine = opened(model)
    beside = asyncio.ensure_future(sampled(engine, "beside", prompt_of(30), 200))
    prompts = [prompt_of(2500), [*prompt_of(2500), *prompt_of(40, 7)]]
    for prompt in prompts:
        check(model, prompt, await sampled(engine, str(len(prompt)), prompt))
    check(model, prompt_of(30), await beside)


async def test_a_model_with_windows_never_reads_pages(calls, opened, tmp_path):
    model = made(
        tmp_path / "m", Qwen2Config, use_sliding_window=True, sliding_window=16,
        max_window_layers=1, layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    engine = opened(model)
    prompts = [prompt_of(40), prompt_of(3)]
    results = await asyncio.gather(*(sampled(engine, str(len(p)), p) for p in prompts))
    for prompt, result in zip(prompts, results, strict=True):
        check(model, prompt, result)
    assert (calls["in_pages"], calls["varlen"] > 0) == (0, True)


async def test_what_runs_is_computed_anew_with_new_weights(calls, opened, tmp_path):
    old, new = made(tmp_path / "old", seed=1), made(tmp_path / "new", seed=2)
    engine = opened(old)
    running = asyncio.ensure_future(sampled(engine, "long", prompt_of(40), 400))
    while len(engine._sampled_so_far("long")[0]) < 20:
        await asyncio.sleep(0)
    await engine.pause("keep")
    engine.load_weights(new)
    engine.set_version(1)
    await engine.resume()
    result = await running
    (_, _, seam), (version, _, _) = result.spans
    assert (version, 0 < seam < 400) == (1, True)
    after = [*prompt_of(40), *result.token_ids[:seam]]
    result.token_ids[:], result.logprobs[:] = result.token_ids[seam:], result.logprobs[seam:]
    check(new, after, result)
    assert calls["in_pages"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("heads, groups, width", [(4, 4, 32), (14, 2, 64), (8, 1, 128), (6, 2, 80)])
@pytest.mark.parametrize("requests", [1, 7, 300])
@pytest.mark.parametrize("most_new", [1, 40])
def test_on_a_gpu_pages_are_read_as_the_reference_reads_them(
    heads, groups, width, requests, most_new
):
    from flash.worker.paged import attend_in_pages  # noqa: PLC0415 (it imports triton)

    torch.manual_seed(0)
    lengths = [(1, PAGE, PAGE + 1, 200, 64, 1000, 33)[n % 7] for n in range(requests)]
    new = [min(length, 1 + (7 * n) % most_new) for n, length in enumerate(lengths)]
    rows = requests + 3  # some only fill up
    queries, ends = (
        torch.tensor([0, *counts, 0, 0, 0]).cumsum(0).int() for counts in (new, lengths)
    )
    tokens = rows if most_new == 1 else int(queries[-1]) + rows
    most = 64
    pages = torch.full((rows, most), -1, dtype=torch.int32)
    free = torch.randperm(requests * most) + 2
    for number, length in enumerate(lengths):
        used = -(-length // PAGE)
        pages[number, :used] = free[number * most :][:used].int()

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape).bfloat16()

    tensors = [drawn(count, tokens, width).transpose(0, 1) for count in (heads, groups, groups)]
    caches = [drawn(requests * most + 2, PAGE, groups, width) for _ in range(2)]
    exact = [cache.float() for cache in caches]
    expected = in_pages(
        *(tensor.float() for tensor in tensors), keys=exact[0], values=exact[1], pages=pages,
        queries=queries, ends=ends, unused=PAGE, scale=0.2,
    )  # fmt: skip
    on_gpu = [cache.cuda() for cache in caches]
    found = attend_in_pages(
        *(tensor.cuda() for tensor in tensors), keys=on_gpu[0], values=on_gpu[1],
        pages=pages.cuda(), queries=queries.cuda(), ends=ends.cuda(), unused=PAGE, scale=0.2,
    )  # fmt: skip
    assert (found.cpu().float() - expected).norm() < 0.01 * expected.norm()
    for stored, true in zip(on_gpu, exact, strict=True):
        stored[1, 0], true[1, 0] = 0, 0  # the token that what only fills up may write
        assert torch.equal(stored.cpu().float(), true)


WINDOWS = {
    "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, WINDOWS], ids=["all see all", "windows"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
async def test_on_a_gpu_logprobs_are_those_of_the_version_that_is_told(settings, dtype, tmp_path):
    """Prompts that come while others sample, and weights that change under all of them."""
    old, new = (big(tmp_path / str(seed), seed, **settings) for seed in (1, 2))
    engine = EmbeddedEngine(
        str(old), device="cuda", dtype=dtype, cache_tokens=16_384, max_running=24
    )
    try:
        prompts = [prompt_of(20 + 37 * n, n) for n in range(20)] + [prompt_of(2500)]
        running = [
            asyncio.ensure_future(sampled(engine, str(n), p, 100)) for n, p in enumerate(prompts)
        ]
        while len(engine._sampled_so_far("3")[0]) < 20:
            await asyncio.sleep(0)
        await engine.pause("keep")
        engine.load_weights(new)
        engine.set_version(1)
        await engine.resume()
        results = await asyncio.gather(*running)
    finally:
        engine.close()
    models = [load_both(model) for model in (old, new)]
    assert any(len(result.spans) == 2 for result in results)
    of_engine, of_bfloat16 = [], []
    for prompt, result in zip(prompts, results, strict=True):
        for version, start, end in result.spans:
            text = [*prompt, *result.token_ids[:end]]
            exact, half = (logprobs_at(m, text, end - start) for m in models[version])
            told = torch.tensor(result.logprobs[start:end])
            of_engine.append(told - exact)
            of_bfloat16.append(half - exact)
    error, usual = (torch.cat(gaps).abs().mean() for gaps in (of_engine, of_bfloat16))
    limit = 1.5 * usual if dtype == "bfloat16" else 1e-4
    assert error < limit, f"{error:.5f}; in bfloat16 a plain forward has {usual:.5f}"


def big(folder: Path, seed: int, **settings) -> Path:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4000,
        bos_token_id=None, initializer_range=0.08, **settings,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def load_both(model: Path):
    return [
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype).cuda()
        for dtype in (torch.float32, torch.bfloat16)
    ]


@torch.no_grad()
def logprobs_at(model, text: list[int], count: int) -> Tensor:
    """Of the last tokens, at the temperature that `sampled` samples at."""
    logits = model(torch.tensor([text]).cuda()).logits[0, -count - 1 : -1].float() / 0.7
    picked = logits.log_softmax(-1).gather(-1, torch.tensor(text[-count:]).cuda()[:, None])
    return picked[:, 0].cpu()
