"""A trainer's ranks on several nodes: the seam, and real ranks of two roles, without a cluster."""

import asyncio
import logging
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import transformers

from flash import config as configuration
from flash.cluster.place import Place
from flash.cluster.ranks import RanksOnNodes, RanksRole
from flash.cluster.roles import plan_of
from flash.errors import NodeLost, ProcessFailure
from flash.fakes import FakeBatchLog, FakeRanks, FakeRanksNode, fake_sample
from flash.trainer.config import TrainerConfig
from flash.trainer.lasting import LastingTrainer
from flash.trainer.ranks import LocalRanks
from flash.trainer.trainer import Trainer
from flash.types import Batch
from flash.virtual_time import in_virtual_time

CONFIG = TrainerConfig(ranks=2, threads=1, learning_rate=1e-3, tokens_per_micro_batch=60)
AWAY = Place("trainer-1", "1a2b", "n1", "127.0.0.1", 1, 1, ())
ANSWERS = {"start": "", "room": None, "step": {"loss": 1.0}}


def batch(version: int = 0) -> Batch:
    rng = np.random.default_rng(version)
    mask = np.arange(12) >= 6
    samples = [
        fake_sample(
            rng.integers(0, 97, 12),
            mask.astype(np.float32),
            logprobs=np.where(mask, -4.0, 0.0).astype(np.float32),
            versions=np.where(mask, version, -1),
            advantage=float(rng.normal()),
            episode=episode,
        )
        for episode in range(6)
    ]
    return Batch(samples=samples, version=version)


def model_in(folder: Path) -> Path:
    settings = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    return folder


class Controller:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.places: list[Place] = []

    async def register(self, place: Place) -> None:
        self.places.append(place)


def role_in(folder: Path, controller: Controller) -> RanksRole:
    config = configuration.load("frozen_lake", {"cluster": "ray", "runs_dir": str(folder)})
    (folder / "marker").touch()
    return RanksRole(plan_of(config, token="t", marker=folder / "marker"), AWAY, controller)


@pytest.mark.slow
async def test_ranks_on_two_nodes_make_the_steps_of_ranks_on_one(tmp_path):
    model, weights, metrics = model_in(tmp_path / "model"), [], []
    role = role_in(tmp_path, controller := Controller())
    for starter in (LocalRanks(), RanksOnNodes(LocalRanks(), [role])):
        async with Trainer(
            model=model, config=CONFIG, run_dir=tmp_path / "run", starter=starter
        ) as trainer:
            made = [await trainer.step(batch(version)) for version in range(2)]
            exported = await trainer.export_weights()
            weights.append([p.read_bytes() for p in sorted(exported.path.glob("*.safetensors"))])
            metrics.append([{n: x for n, x in each.items() if "time" not in n} for each in made])
    assert weights[0] == weights[1]
    assert metrics[0] == metrics[1]
    assert controller.places == [AWAY]


@pytest.mark.slow
async def test_ranks_of_a_controller_that_was_lost_are_ended_when_another_starts_its_own(tmp_path):
    role = role_in(tmp_path, Controller())
    await role.start("first", [1], str(tmp_path))
    left = [p for p in psutil.Process().children() if "flash.trainer" in p.cmdline()]
    await role.start("second", [1, 2], str(tmp_path))
    assert left
    assert not any(process.is_running() for process in left)
    with pytest.raises(ProcessFailure, match="rank 1 has ended: trainer-1 has started anew"):
        await role.call("first", 1, "score", ([[1, 2]],))
    with pytest.raises(ProcessFailure, match="rank 1 at 127.0.0.1 raised"):  # it has no model
        await role.call("second", 1, "score", ([[1, 2]],))
    for rank in (1, 2):
        await role.stop("second", rank, 0.0)


async def test_a_node_that_lacks_the_runs_disk_has_no_ranks(tmp_path):
    role = role_in(tmp_path, Controller())
    (tmp_path / "marker").unlink()
    with pytest.raises(ValueError, match="runs_dir='.*' is not shared with the node at 127.0.0.1"):
        await role.start("first", [1], str(tmp_path))


@in_virtual_time
async def test_ranks_of_a_node_follow_each_other_and_meet_at_the_first_node(tmp_path):
    others = [FakeRanksNode(f"trainer-{number}", ANSWERS) for number in (1, 2)]
    starter = RanksOnNodes(FakeRanks(ANSWERS), others)
    started = await starter.start(6, tmp_path)
    assert [rank.name for rank in started.ranks] == [
        "trainer rank 0", "trainer rank 1", "trainer rank 2 at 10.0.0.1",
        "trainer rank 3 at 10.0.0.1", "trainer rank 4 at 10.0.0.1", "trainer rank 5 at 10.0.0.1",
    ]  # fmt: skip
    assert [list(node.starts[0][1]) for node in others] == [[2, 3], [4, 5]]
    assert {meeting[:2] for meeting in started.meetings} == {("127.0.0.1", 1)}
    assert [meeting.address for meeting in started.meetings] == 2 * ["127.0.0.1"] + 4 * ["10.0.0.1"]
    for rank in started.ranks:
        await rank.stop()
    assert not any(rank.alive for rank in started.ranks)


@in_virtual_time
async def test_a_start_waits_for_nodes_without_a_deadline_and_says_so_once(tmp_path, caplog):
    nodes = [FakeRanksNode(f"trainer-{number}", ANSWERS) for number in (1, 2)]
    for node in nodes:
        node.lose()
    starter = RanksOnNodes(FakeRanks(ANSWERS), nodes)
    starting = asyncio.create_task(starter.start(3, tmp_path))
    with caplog.at_level(logging.WARNING):
        await asyncio.sleep(86_400)
    assert [record.getMessage() for record in caplog.records] == [
        "the trainer waits for a node for trainer-1, trainer-2, however long: Ray has none with "
        "room for it (cluster.trainer)"
    ]
    nodes[0].come_back()
    await asyncio.sleep(1)
    assert starter.waits_for == "a node for trainer-2"
    nodes[1].come_back()
    started = await starting
    assert starter.waits_for == ""
    for rank in started.ranks:
        await rank.stop()


@in_virtual_time
async def test_a_rank_that_is_called_on_a_node_that_is_lost_fails_at_once(tmp_path):
    node = FakeRanksNode("trainer-1", {"start": ""})
    started = await RanksOnNodes(FakeRanks(ANSWERS), [node]).start(2, tmp_path)
    far = started.ranks[1]
    stepping = asyncio.create_task(far.call("step", timeout_s=1e6))
    await asyncio.sleep(1)
    node.lose()
    with pytest.raises(NodeLost):
        await stepping
    assert str(await far.wait_dead()) == "trainer rank 1 at 10.0.0.1: trainer-1 is lost"
    assert not far.alive
    assert asyncio.get_running_loop().time() < 60
    await far.stop()


@in_virtual_time
async def test_a_node_that_is_lost_while_ranks_load_their_first_model_is_waited_for(tmp_path):
    answers = {}  # the model is loaded for ever
    node = FakeRanksNode("trainer-1", answers)
    starter = RanksOnNodes(FakeRanks(ANSWERS), [node])
    trainer = Trainer(model="m", config=CONFIG, run_dir=tmp_path, starter=starter)
    entering = asyncio.create_task(trainer.__aenter__())
    await asyncio.sleep(1)
    node.lose()
    answers |= ANSWERS
    await asyncio.sleep(3600)
    node.come_back()
    assert await entering is trainer
    assert len(node.starts) == 2
    await trainer.__aexit__()


async def test_a_trainer_goes_on_when_a_lost_node_is_back(tmp_path):
    node = FakeRanksNode("trainer-1", ANSWERS)
    here = FakeRanks(ANSWERS)
    trainer = LastingTrainer(
        Trainer(model="m", config=CONFIG, run_dir=tmp_path, starter=RanksOnNodes(here, [node])),
        log=(log := FakeBatchLog()),
        newest=lambda: None,
        max_restarts=1,
    )
    async with trainer:
        for version in range(2):  # a step between two losses begins the count anew
            node.lose()
            log.handed_over(batch(version))
            stepping = asyncio.create_task(trainer.step(batch(version)))
            await node.awaited.wait()
            assert trainer.state().waits_for == "a node for trainer-1"
            assert trainer.state().doing == "restart: start"
            assert trainer.state().dead == ""
            node.come_back()
            assert (await stepping)["trainer/restarts"] == version + 1
            assert not here.started[version].alive
    assert len({name for name, _ in node.starts}) == 3
    assert trainer.version == 2
