"""The trainer as the controller sees it; ranks are real processes wherever it enters one."""

import asyncio
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from flash.errors import ProcessFailure, TrainerFailure
from flash.fakes import fake_sample
from flash.trainer.advantage_settings import ReinforcePp
from flash.trainer.checkpoint import checkpoint_version, write_state
from flash.trainer.config import TrainerConfig
from flash.trainer.hugging_face import export_model
from flash.trainer.objectives.settings import Gspo, KlSettings
from flash.trainer.trainer import Trainer
from flash.types import Batch, Sample
from flash.virtual_time import in_virtual_time
from flash.worker.delta import delta_of
from tests.families import save_family

SamplesOf = Callable[..., list[Sample]]
SaveModel = Callable[..., Path]
Reference = Callable[[Any, list[int]], list[float]]

CONFIG = TrainerConfig(learning_rate=1e-3, warmup_steps=0, threads=1)
PROBE = list(range(20))


def batch_of(samples: list[Sample], version: int = 0) -> Batch:
    return Batch(samples=samples, version=version)


def not_started(tmp_path: Path) -> Trainer:
    return Trainer(model="none", config=CONFIG, run_dir=tmp_path)


# ── what is refused before any rank hears of it ──────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"logprobs": np.full(4, np.nan, np.float32)}, "episode 17.*not finite"),
        ({"advantage": float("inf")}, "episode 17.*not finite"),
        ({"logprobs": np.zeros(3, np.float32)}, "episode 17.* logprobs 3, versions 4, .* equal"),
        ({"turns": np.zeros(5, np.int64)}, "episode 17.* temperatures 4, turns 5; .* equal"),
        ({"loss_mask": np.array([0, 1, -1, 1], np.float32)}, "episode 17.*mask"),
        ({"loss_mask": np.array([0, 1, np.nan, 1], np.float32)}, "episode 17.*mask"),
        ({"advantage": np.array([0, np.nan, 0, 0], np.float32)}, "episode 17.*not finite"),
        ({"advantage": np.zeros(3, np.float32)}, r"episode 17.*shape \(3,\).*each of the 4 tokens"),
        (
            {"temperatures": np.array([1, 1, 0, 0.5], np.float32)},
            "episode 17.*temperature 0; only what.*above 0",
        ),
        (
            {"temperatures": np.array([1, 1, 1, np.nan], np.float32)},
            "episode 17.*temperature nan; only what.*above 0",
        ),
    ],
)
async def test_a_sample_that_cannot_be_trained_on_is_named(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    good = fake_sample(range(4), episode=17)
    with pytest.raises(ValueError, match=said):
        await not_started(tmp_path).step(batch_of([good, replace(good, **change)]))


async def test_a_batch_without_a_token_to_train_on_is_refused(
    tmp_path: Path, samples_of: SamplesOf
) -> None:
    first_only = [
        replace(s, loss_mask=np.eye(1, s.num_tokens, dtype=np.float32)[0]) for s in samples_of(3)
    ]
    for samples in (first_only, []):
        with pytest.raises(ValueError, match="no token to train on"):
            await not_started(tmp_path).step(batch_of(samples))


async def test_a_batch_for_another_version_is_refused(
    tmp_path: Path, samples_of: SamplesOf
) -> None:
    with pytest.raises(ValueError, match="version 4.*is at 0"):
        await not_started(tmp_path).step(batch_of(samples_of(1), version=4))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    for folder in ("model", "policy"):
        (directory / folder).mkdir(parents=True)
    (directory / "model" / "config.json").write_bytes(b"w" * 100)
    (directory / "policy/.metadata").write_bytes(b"o" * 100)
    write_state(directory, 12)
    return directory


def test_a_whole_checkpoint_tells_its_version(checkpoint: Path) -> None:
    assert checkpoint_version(checkpoint) == 12


@pytest.mark.parametrize("name", ["trainer.json", "policy/.metadata", "model/config.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_named_with_the_remedy(
    name: str, damage: str, checkpoint: Path, tmp_path: Path
) -> None:
    path = checkpoint / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=f"{checkpoint}.*{name}.*take another folder"):
        Trainer(model="none", config=CONFIG, run_dir=tmp_path, resume_from=checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "optimizer/.metadata"])
def test_a_checkpoint_with_its_weights_in_model_is_refused_with_the_remedy(
    name: str, checkpoint: Path
) -> None:
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_bytes(b"o")
    write_state(checkpoint, 12)
    with pytest.raises(ValueError, match=rf"earlier version \({name}\).*--model of its model/"):
        checkpoint_version(checkpoint)
    (checkpoint / "model" / "adapter_model.safetensors").write_bytes(b"a")
    write_state(checkpoint, 12)
    with pytest.raises(ValueError, match="--model of what PEFT's merge_and_unload makes of its"):
        checkpoint_version(checkpoint)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trainer.json").write_text(json.dumps({"something": "else"}))
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="is not a checkpoint"):
            checkpoint_version(folder)


# ── processes ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
async def test_two_ranks_given_parts_compute_what_one_does_and_one_goes_on_where_two_stopped(
    tmp_path: Path, save_model: SaveModel, samples_of: SamplesOf, reference_logprobs: Reference
) -> None:
    model = save_model(tmp_path / "model")
    # The second batch leaves a rank without a sample; the small budget leaves it with fewer passes.
    batches = [batch_of(samples_of(7), 0), batch_of(samples_of(1, version=1), 1)]
    third = batch_of(samples_of(5, seed=3, version=2), 2)
    two_ranks = CONFIG.model_copy(update={"ranks": 2, "tokens_per_micro_batch": 50})
    saved = tmp_path / "checkpoint"
    async with (
        Trainer(model=model, config=CONFIG, run_dir=tmp_path / "1") as one,
        Trainer(model=model, config=two_ranks, run_dir=tmp_path / "2") as two,
    ):
        await same_step(one, two, batches[0], parts_end=(1, 3))
        await same_step(one, two, batches[1])
        await two.save_checkpoint(saved)

        exports = [await two.export_weights() for _ in range(3)]
        assert [weights.path.is_dir() for weights in exports] == [False, True, True]
        assert exports[-1].version == two.version == 2
        assert [weights.changed for weights in exports] == [None, 0.0, 0.0]
        delta = delta_of(exports[-1].path)
        assert delta is not None
        assert delta.before == str(exports[-2].path)
        reloaded: Any = AutoModelForCausalLM.from_pretrained(exports[-1].path)
        assert exports[-1].score is not None
        scored = (await exports[-1].score([PROBE])).logprobs[0]
        assert reference_logprobs(reloaded, PROBE) == pytest.approx(scored, abs=1e-5)

        # One trainer would have stopped here, and the other never did.
        async with Trainer(
            model=model, config=CONFIG, run_dir=tmp_path / "3", resume_from=saved
        ) as resumed:
            assert resumed.version == 2
            await same_step(one, resumed, third)
    assert not any(weights.path.exists() for weights in exports)


@pytest.mark.slow
async def test_two_ranks_train_experts_as_one_does_and_write_them_one_by_one(
    tmp_path: Path, samples_of: SamplesOf, reference_logprobs: Reference
) -> None:
    model = tmp_path / "model"
    save_family(model, "mixtral")
    two_ranks = CONFIG.model_copy(update={"ranks": 2})
    async with (
        Trainer(model=str(model), config=CONFIG, run_dir=tmp_path / "1") as one,
        Trainer(model=str(model), config=two_ranks, run_dir=tmp_path / "2") as two,
    ):
        await same_step(one, two, batch_of(samples_of(7), 0))
        await two.save_checkpoint(tmp_path / "checkpoint")
        weights = await two.export_weights()
        written = await exported(two)
        scored = (await two.score([PROBE])).logprobs[0]
        reloaded: Any = AutoModelForCausalLM.from_pretrained(weights.path)
    before = load_file(model / "model.safetensors")
    export_model(tmp_path / "checkpoint", tmp_path / "out", dtype="float32")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == before.keys() == saved.keys()
    expert = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    assert not np.array_equal(written[expert], before[expert])
    for name, tensor in written.items():
        assert np.array_equal(tensor, saved[name]), name
    assert reference_logprobs(reloaded, PROBE) == pytest.approx(scored, abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_training_goes_on_on_another_number_of_ranks(
    tmp_path: Path, save_model: SaveModel, samples_of: SamplesOf
) -> None:
    """From 2 to 1 and to 4, then from 4 to 2."""
    model = save_model(tmp_path / "model", tied=False)
    begun, of_four = tmp_path / "begun", tmp_path / "of_four"

    def on(ranks: int, checkpoint: Path | None) -> Trainer:
        return Trainer(
            model=model,
            config=CONFIG.model_copy(update={"ranks": ranks}),
            run_dir=tmp_path / f"{ranks}",
            resume_from=checkpoint,
        )

    async with on(2, None) as two:
        await two.step(batch_of(samples_of(7), 0))
        await two.save_checkpoint(begun)
    async with on(1, begun) as one:
        async with on(4, begun) as four:
            await same_step(one, four, batch_of(samples_of(5, seed=1, version=1), 1))
            await four.save_checkpoint(of_four)
        assert len([*(of_four / "policy").glob("*.distcp")]) == 4
        async with on(2, of_four) as two:
            await same_step(one, two, batch_of(samples_of(5, seed=2, version=2), 2))


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_groups_that_shard_inside_and_replicate_across_come_to_the_weights_of_plain_sharding(
    tmp_path: Path, save_model: SaveModel, samples_of: SamplesOf
) -> None:
    model = save_model(tmp_path / "model")
    batches = [batch_of(samples_of(7), 0), batch_of(samples_of(1, version=1), 1)]
    third = batch_of(samples_of(5, seed=3, version=2), 2)
    changes = {"ranks": 4, "shard_size": 2, "tokens_per_micro_batch": 50}
    in_groups = CONFIG.model_copy(update=changes)
    saved = tmp_path / "checkpoint"
    async with Trainer(model=model, config=CONFIG, run_dir=tmp_path / "1") as plain:
        async with Trainer(model=model, config=in_groups, run_dir=tmp_path / "4") as grouped:
            for batch in batches:
                await same_step(plain, grouped, batch)
            await grouped.save_checkpoint(saved)
            weights = [await exported(trainer) for trainer in (plain, grouped)]
            assert weights[0].keys() == weights[1].keys()
            for name, tensor in weights[0].items():
                assert weights[1][name] == pytest.approx(tensor, abs=1e-6), name
        two = CONFIG.model_copy(update={"ranks": 2})
        async with Trainer(
            model=model, config=two, run_dir=tmp_path / "2", resume_from=saved
        ) as resumed:
            await same_step(plain, resumed, third)
        async with Trainer(
            model=model, config=in_groups, run_dir=tmp_path / "again", resume_from=saved
        ) as again:
            await again.step(third)
            scores = [(await each.score([PROBE])).logprobs[0] for each in (plain, again)]
            assert scores[1] == pytest.approx(scores[0], abs=2e-5)


async def exported(trainer: Trainer) -> dict[str, Any]:
    """Its weights by name."""
    weights: dict[str, Any] = {}
    for file in (await trainer.export_weights()).path.glob("*.safetensors"):
        weights |= load_file(file)
    return weights


async def test_parts_are_refused_where_a_step_takes_the_whole_batch(
    tmp_path: Path, samples_of: SamplesOf
) -> None:
    for change in ({"mini_batches": 2}, {"advantages": ReinforcePp()}):
        config = CONFIG.model_copy(update=change)
        trainer = Trainer(model="none", config=config, run_dir=tmp_path)
        with pytest.raises(ValueError, match="in parts only as one mini-batch"):
            await trainer.add(batch_of(samples_of(1)))


@pytest.mark.slow
async def test_two_ranks_compute_sequences_percentiles_divergence_and_entropy_as_one_does(
    tmp_path: Path,
    save_model: SaveModel,
    samples_of: SamplesOf,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, other = (
        save_model(tmp_path / name, tied=name == "model") for name in ("model", "other")
    )
    config = CONFIG.model_copy(
        update={
            "objective": Gspo(clip_low=0.5, clip_high=0.5),
            "kl": KlSettings(coefficient=0.1, place="reward", reference=str(other)),
            "advantages": ReinforcePp(),  # whitened with the divergence, by the trainer
            "entropy_bonus": 0.01,
        }
    )
    two_ranks = config.model_copy(update={"ranks": 2, "tokens_per_micro_batch": 50})
    async with (
        Trainer(model=model, config=config, run_dir=tmp_path / "1") as one,
        Trainer(model=model, config=two_ranks, run_dir=tmp_path / "2") as two,
    ):
        await same_step(one, two, batch_of(samples_of(7), 0))
    # These samples' logprobs are made up.
    assert "engine and trainer disagree on tokens of the same weights by" in caplog.text


async def same_step(
    a: Trainer, b: Trainer, batch: Batch, *, parts_end: tuple[int, ...] = ()
) -> None:
    """`b` is given the samples before each of `parts_end` as parts of the batch."""
    begin = 0
    for end in parts_end:
        await b.add(replace(batch, samples=batch.samples[begin:end], last=False))
        begin = end
    rest = replace(batch, samples=batch.samples[begin:])
    metrics_a, metrics_b = await asyncio.gather(a.step(batch), b.step(rest))
    del metrics_a["time/train_s"], metrics_b["time/train_s"]
    assert metrics_a == pytest.approx(metrics_b, abs=1e-6, rel=1e-6)
    assert metrics_a["tokens/trained"] == sum((s.loss_mask > 0).sum() for s in batch.samples)
    scores_a, scores_b = await asyncio.gather(a.score([PROBE]), b.score([PROBE]))
    assert scores_a.logprobs[0] == pytest.approx(scores_b.logprobs[0], abs=2e-5)


def listening(pid: int) -> list[str]:
    """The addresses at which a process's family can be reached."""
    return [
        connection.laddr.ip
        for process in psutil.Process(pid).children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]


@pytest.mark.slow
async def test_a_killed_rank_ends_the_step_at_once_with_its_name_and_takes_the_other_along(
    tmp_path: Path, save_model: SaveModel, samples_of: SamplesOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")  # whatever interface is the machine's own
    model = save_model(tmp_path / "model")
    config = CONFIG.model_copy(update={"ranks": 2, "tokens_per_micro_batch": 30})
    async with Trainer(model=model, config=config, run_dir=tmp_path) as trainer:
        first, second = trainer._children
        assert set(listening(first.pid) + listening(second.pid)) == {"127.0.0.1"}
        with second.log_path.open("a") as log:
            log.write("the last words of rank 1\n")
        # Stopped, it holds up its sibling in a collective: they are in mid-step.
        os.kill(second.pid, signal.SIGSTOP)
        step = asyncio.create_task(trainer.step(batch_of(samples_of(40))))
        await asyncio.sleep(0)
        os.kill(second.pid, signal.SIGKILL)
        with pytest.raises(TrainerFailure, match=r"rank 1 .*exit code -9") as failure:
            async with asyncio.timeout(10):
                await step
        assert "the last words of rank 1" in str(failure.value)
        async with asyncio.timeout(10):
            await first.wait_dead()
        with pytest.raises(TrainerFailure):
            await trainer.score([PROBE])
        assert trainer.version == 0


@in_virtual_time
async def test_of_a_death_and_what_its_siblings_say_of_it_the_death_is_the_cause(tmp_path):
    class Rank:
        def __init__(self, lives_s):
            self.lives_s = lives_s

        async def wait_dead(self):
            await asyncio.sleep(self.lives_s)
            return ProcessFailure("rank 1 was killed")

    trainer = Trainer(model=tmp_path, config=CONFIG, run_dir=tmp_path)
    noticed = ProcessFailure("rank 0 raised: the connection broke off")
    trainer._children = [Rank(1e6), Rank(0.1)]
    assert str(await trainer._cause(noticed)) == "rank 1 was killed"
    trainer._children = [Rank(1e6), Rank(1e6)]
    assert await trainer._cause(noticed) is noticed
    assert asyncio.get_running_loop().time() < 60


@pytest.mark.parametrize(
    ("method", "can_save"), [("step", False), ("finish", False), ("export", True), ("score", True)]
)
@in_virtual_time
async def test_a_trainer_whose_step_was_given_up_can_not_be_saved(
    method: str, can_save: bool, tmp_path: Path
) -> None:
    """Which weights its ranks have is not known: the step goes on there."""

    class BusyRank:
        alive = True

        async def call(self, *_: object, timeout_s: float) -> None:
            await asyncio.sleep(timeout_s)

    trainer = not_started(tmp_path)
    trainer._children = [BusyRank()]  # type: ignore[list-item]
    assert trainer.can_save
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await trainer._call(method)
    assert trainer.can_save == can_save
    trainer._children[0].alive = False  # type: ignore[misc]
    assert not trainer.can_save


@pytest.mark.slow
async def test_a_model_that_cannot_be_loaded_is_refused_in_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    trainer = Trainer(model=empty, config=CONFIG, run_dir=tmp_path)
    with pytest.raises(ValueError, match=rf"^model='{empty}': [^\n]+$"):
        await trainer.__aenter__()
    assert trainer._scratch is None
    assert not any(child.alive for child in trainer._children)


@pytest.mark.slow
async def test_what_stands_beside_a_trainer_begins_before_its_ranks_are_ready(
    tmp_path: Path, save_model: SaveModel
) -> None:
    trainer = Trainer(model=save_model(tmp_path / "m"), config=CONFIG, run_dir=tmp_path)
    async with trainer.starting():
        began_before = not trainer._starting.done()
        await trainer.ready()
        assert len((await trainer.score([PROBE])).logprobs[0]) == len(PROBE) - 1
    assert began_before
    assert not any(child.alive for child in trainer._children)


@pytest.mark.slow
async def test_ranks_that_fail_cancel_what_was_begun_beside_them(tmp_path: Path) -> None:
    trainer = Trainer(model=tmp_path / "nothing", config=CONFIG, run_dir=tmp_path)
    with pytest.raises(ValueError, match="nothing': config.json can't be fetched"):
        async with trainer.starting():
            await asyncio.Event().wait()


async def test_an_error_beside_a_trainer_before_it_has_begun_is_told_and_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="no workers"):
        async with not_started(tmp_path).starting():
            raise ValueError("no workers")
    assert (tmp_path / "mine").exists()


async def test_ranks_that_take_too_long_are_killed_and_the_setting_is_named(
    tmp_path: Path,
) -> None:
    config = CONFIG.model_copy(update={"start_timeout_s": 0.05})
    trainer = Trainer(model="none", config=config, run_dir=tmp_path)
    with pytest.raises(TrainerFailure, match=r"start took longer than 0\.05 s.*start_timeout_s"):
        await trainer.__aenter__()
    assert not any(child.alive for child in trainer._children)


@pytest.mark.slow
async def test_a_model_that_can_not_be_trained_is_the_users_to_change(tmp_path: Path) -> None:
    config: Any = AutoConfig.for_model(
        "bert", vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, initializer_range=0.3,
    )  # fmt: skip
    model = tmp_path / "bert"
    model_class: Any = AutoModelForCausalLM
    model_class.from_config(config).save_pretrained(model)
    with pytest.raises(ValueError, match=r"^model='.*bert': model_type='bert' computes other logp"):
        async with Trainer(model=model, config=TrainerConfig(threads=1), run_dir=tmp_path):
            pass
