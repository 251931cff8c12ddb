"""Adapters: what a rank trains with them, what workers and checkpoints get of it."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from flash.trainer.config import LoraConfig, TrainerConfig
from flash.trainer.lora import adapted_model, check_installed
from flash.trainer.model_files import check_files
from flash.trainer.objectives.settings import KlSettings, Supervised
from flash.trainer.packing import divide
from flash.trainer.rank import Rank
from flash.trainer.trainer import Trainer
from flash.types import Batch, Sample
from tests.saved import save

pytestmark = pytest.mark.slow

SamplesOf = Callable[..., list[Sample]]
SaveModel = Callable[..., Path]
Reference = Callable[[Any, list[int]], list[float]]
Model: Any = AutoModelForCausalLM

LORA = LoraConfig(rank=4, alpha=8)
CONFIG = TrainerConfig(lora=LORA, learning_rate=0.02, warmup_steps=0, weight_decay=0.1)
TEXT = list(range(5, 25))


@pytest.fixture
def model(save_model: SaveModel, tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


@contextlib.contextmanager
def started(
    model: Path, config: TrainerConfig, checkpoint: Path | None = None, reference: str | None = None
) -> Iterator[Rank]:
    rank = Rank()
    try:
        kept = checkpoint and str(checkpoint)
        assert rank.start(str(model), kept, config, 0, 1, None, 0, reference) == ""
        yield rank
    finally:
        dist.destroy_process_group()


def step(rank: Rank, samples: list[Sample], config: TrainerConfig, version: int = 0) -> Any:
    (share,) = divide(samples, config)
    return rank.step(share, version)


def parameters_of(rank: Rank, *, trained: bool) -> dict[str, torch.Tensor]:
    return {
        name: parameter.full_tensor().detach().clone()  # type: ignore[attr-defined]
        for name, parameter in rank._model.named_parameters()
        if parameter.requires_grad is trained
    }


def exported(rank: Rank, folder: Path) -> dict[str, torch.Tensor]:
    rank.export(str(folder))
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def test_steps_are_those_of_low_rank_changes_written_out(
    model: Path, samples_of: SamplesOf
) -> None:
    config = CONFIG.model_copy(update={"objective": Supervised(), "max_grad_norm": 0.5})
    batches = [samples_of(4, seed=seed) for seed in range(3)]
    with started(model, config) as rank:
        first = parameters_of(rank, trained=True)
        norms = [step(rank, batch, config)["grad_norm"] for batch in batches]
        trained = parameters_of(rank, trained=True)

    plain = Model.from_pretrained(model, dtype=torch.float32).eval()
    weights = dict(plain.named_parameters())
    own = {name: tensor.clone().requires_grad_() for name, tensor in first.items()}
    optimizer = torch.optim.AdamW(
        own.values(), lr=config.learning_rate, betas=config.betas, weight_decay=0.1
    )
    expected = []
    for batch in batches:
        changed = dict(weights)
        for name in (n for n in own if ".lora_A." in n):
            at = name.replace(".lora_A.default.", ".")
            low = own[name.replace(".lora_A.", ".lora_B.")] @ own[name]
            changed[at] = weights[at].detach() + 8 / 4 * low
        losses = []
        for sample in batch:
            ids = torch.as_tensor(sample.token_ids).long()
            logits_LV = functional_call(plain, changed, (), {"input_ids": ids[None]}).logits[0]
            taken = logits_LV[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            losses.append(-taken[torch.as_tensor(sample.loss_mask[1:] > 0)])
        torch.cat(losses).mean().backward()
        expected.append(float(torch.nn.utils.clip_grad_norm_(own.values(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    assert norms == pytest.approx(expected, rel=1e-3)
    assert trained.keys() == own.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(trained[name], tensor.detach(), atol=1e-4, rtol=1e-3)


def test_the_weights_stay_and_a_worker_gets_what_peft_would_merge(
    model: Path, samples_of: SamplesOf, reference_logprobs: Reference, tmp_path: Path
) -> None:
    with started(model, CONFIG) as rank:
        before = parameters_of(rank, trained=False)
        untrained = exported(rank, tmp_path / "v0")
        for version in range(2):
            step(rank, samples_of(4, seed=version), CONFIG, version)
        after = parameters_of(rank, trained=False)
        (own,) = rank.score([TEXT]).logprobs  # the weights are whole in memory when exported
        merged = exported(rank, tmp_path / "v2")
        save(rank, tmp_path / "saved", 2)

    plain = Model.from_pretrained(model).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert untrained.keys() == merged.keys() == plain.keys() - {"lm_head.weight"}
    assert all(torch.equal(untrained[name], plain[name]) for name in merged)

    peft: Any = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved" / "model")
    by_peft = peft.merge_and_unload().state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, by_peft[name], atol=1e-6, rtol=0)
    changed = {name for name in merged if not torch.equal(merged[name], plain[name])}
    assert changed == {name for name in merged if "_proj." in name}
    worker = Model.from_pretrained(tmp_path / "v2")
    assert own == pytest.approx(reference_logprobs(worker, TEXT), abs=1e-5)
    assert own != pytest.approx(reference_logprobs(Model.from_pretrained(model), TEXT), abs=1e-2)


def test_in_bfloat16_the_weights_are_kept_so_and_adapters_in_float32(
    model: Path, samples_of: SamplesOf, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"dtype": "bfloat16"})
    with started(model, config) as rank:
        step(rank, samples_of(4), config)
        frozen, trained = (parameters_of(rank, trained=which) for which in (False, True))
        merged = exported(rank, tmp_path / "v1")
        at = "model.layers.1.mlp.up_proj"
        rank.share(str(tmp_path))  # as many tensors as were announced, or it raises
        rank.unshare()
    assert {tensor.dtype for tensor in frozen.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    low = trained[f"{at}.lora_B.default.weight"] @ trained[f"{at}.lora_A.default.weight"]
    whole = frozen[f"{at}.base_layer.weight"].float() + 8 / 4 * low
    torch.testing.assert_close(merged[f"{at}.weight"], whole.bfloat16(), atol=0, rtol=0)


@pytest.mark.parametrize("changed", ["recomputed", "layers are units"])
def test_layers_that_are_recomputed_or_units_of_their_own_train_the_same(
    changed: str, model: Path, samples_of: SamplesOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    config = CONFIG.model_copy(update={"kl": KlSettings(coefficient=0.1)})
    recomputed = config.model_copy(update={"gradient_checkpointing": changed == "recomputed"})
    for settings in (config, recomputed):
        with started(model, settings, reference=str(model)) as rank:
            for version in range(2):
                step(rank, samples_of(4, seed=version), settings, version)
            trained.append(parameters_of(rank, trained=True))
        if changed == "layers are units":
            monkeypatch.setattr("flash.trainer.sharding._ONE_UNIT_PARAMETERS", 0)
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, atol=1e-6, rtol=0)


def test_the_reference_is_the_model_without_adapters(
    model: Path, save_model: SaveModel, samples_of: SamplesOf, tmp_path: Path
) -> None:
    copy = save_model(tmp_path / "copy")  # the same weights, loaded beside the policy
    config = CONFIG.model_copy(update={"kl": KlSettings(coefficient=0.5)})
    told, trained, sizes = [], [], []
    for reference in (model, copy):
        with started(model, config, reference=str(reference)) as rank:
            told.append([step(rank, samples_of(4, seed=v), config, v) for v in range(3)])
            trained.append(parameters_of(rank, trained=True))
            sizes.append(isinstance(rank._reference, torch.nn.Module))
    assert sizes == [False, True]
    assert told[0][0]["kl_reference"] == 0 < told[0][2]["kl_reference"]
    for own, other in zip(*told, strict=True):
        assert own == pytest.approx(other, abs=1e-6)
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, atol=1e-6, rtol=0)


def test_a_checkpoint_is_an_adapter_that_peft_loads_and_a_resume_goes_on_from(
    model: Path, samples_of: SamplesOf, reference_logprobs: Reference, tmp_path: Path
) -> None:
    (model / "tokenizer.json").write_text("{}")
    saved = tmp_path / "step_1"
    with started(model, CONFIG) as rank:
        step(rank, samples_of(4), CONFIG)
        (own,) = rank.score([TEXT]).logprobs
        save(rank, saved, 1)
        told = step(rank, samples_of(4, seed=1), CONFIG, 1)
        trained = parameters_of(rank, trained=True)
    files = {path.name for path in (saved / "model").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files
    assert not any(name.startswith("model") for name in files)
    gathered = FileSystemReader(saved / "policy").read_metadata().state_dict_metadata.keys()
    assert all(".lora_" in name for name in gathered - {"updates"})
    assert len(gathered) > 1

    peft = PeftModel.from_pretrained(Model.from_pretrained(model), saved / "model")
    assert own == pytest.approx(reference_logprobs(peft, TEXT), abs=1e-5)
    by_transformers = Model.from_pretrained(saved / "model")
    assert own == pytest.approx(reference_logprobs(by_transformers, TEXT), abs=1e-5)
    with started(model, CONFIG, saved) as rank:
        assert rank.score([TEXT]).logprobs == [own]
        assert step(rank, samples_of(4, seed=1), CONFIG, 1) == told
        again = parameters_of(rank, trained=True)
    assert all(torch.equal(again[name], trained[name]) for name in trained)


async def test_two_ranks_begin_with_the_same_adapters_and_train_as_one_does(
    model: Path, samples_of: SamplesOf, tmp_path: Path
) -> None:
    told = []
    for ranks in (1, 2):
        config = CONFIG.model_copy(update={"ranks": ranks})
        run = tmp_path / f"of_{ranks}"
        async with Trainer(model=model, config=config, run_dir=run) as trainer:
            for version in range(2):
                await trainer.step(Batch(samples=samples_of(5, seed=version), version=version))
            exported = await trainer.export_weights()
            files = sorted(exported.path.glob("*.safetensors"))
            told.append({name: t for file in files for name, t in load_file(file).items()})
            await trainer.save_checkpoint(run / "saved")
    for name, tensor in told[0].items():
        torch.testing.assert_close(told[1][name], tensor, atol=1e-4, rtol=0)
    config = CONFIG.model_copy(update={"ranks": 2})
    saved = tmp_path / "of_1" / "saved"
    async with Trainer(
        model=model, config=config, run_dir=tmp_path / "more", resume_from=saved
    ) as trainer:
        assert (trainer.version, trainer.model) == (2, str(model))
        weights = await trainer.export_weights()
        for file in weights.path.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                torch.testing.assert_close(tensor, told[0][name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("targets", "why"),
    [
        (("q_proj", "qq_proj"), "'qq_proj' is no linear module of the model: there are down_proj,"),
        (("embed_tokens",), "'embed_tokens' is no linear module of the model"),
        (("self_attn",), "'self_attn' is no linear module of the model"),
        (("lm_head",), "'lm_head' is the head, which has none: there are down_proj, gate_proj, k_"),
        (("proj",), "'proj' is no linear module"),
    ],
)
def test_targets_that_a_model_has_not_are_named_before_its_weights_are_read(
    targets: tuple[str, ...], why: str, model: Path
) -> None:
    wanted = LoraConfig(rank=4, targets=targets)
    with pytest.raises(ValueError, match=rf"^trainer\.lora\.targets=\[.*\]: {why}"):
        check_files(str(model), field="model", lora=wanted)
    check_files(
        str(model), field="model", lora=LoraConfig(rank=4, targets=("layers.1.mlp.up_proj",))
    )
    check_files(str(model), field="model", lora=LORA)


def test_a_model_that_is_not_where_it_was_is_named(model: Path, tmp_path: Path) -> None:
    with started(model, CONFIG) as rank:
        rank.save_model(str(tmp_path / "saved"))
    model.rename(tmp_path / "moved")
    with pytest.raises(
        ValueError, match=r"adapters of the model '.*/model', which can't be loaded"
    ):
        adapted_model(tmp_path / "saved")


def test_without_peft_a_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    check_installed(LoraConfig())
    with pytest.raises(ValueError, match=r"trainer\.lora\.rank=4 needs PEFT, .*: `make setup`"):
        check_installed(LORA)


@pytest.mark.parametrize(
    "settings",
    [{"rank": 8}, {"alpha": 16}, {"targets": ("q_proj",)}, {"rank": 0, "alpha": 32}],
    ids=str,
)
async def test_a_checkpoint_of_other_adapters_is_refused(
    settings: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    with started(model, CONFIG) as rank:
        save(rank, saved, 0)
    with pytest.raises(ValueError, match="there are adapters and no model: .*\\(flash export CHE"):
        check_files(str(saved / "model"), field="model")
    config = CONFIG.model_copy(update={"lora": LORA.model_copy(update=settings)})
    remedy = "give .* as .*, or begin at the first model"
    with pytest.raises(ValueError, match=remedy):
        async with Trainer(model=model, config=config, run_dir=tmp_path, resume_from=saved):
            pass


def test_a_checkpoint_of_a_whole_model_is_refused(model: Path, tmp_path: Path) -> None:
    with started(model, TrainerConfig()) as rank:
        save(rank, tmp_path / "saved", 0)
    with pytest.raises(
        ValueError, match=r"has a whole model and no adapters, with trainer\.lora\."
    ):
        Trainer(model=model, config=CONFIG, run_dir=tmp_path, resume_from=tmp_path / "saved")
