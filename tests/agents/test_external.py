"""An agent that can't be changed: its samples, its reward, its failures, its end."""

import asyncio
import contextlib
import itertools
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from flash import virtual_time
from flash.agents.examples.frozen_lake_openai import act as walk
from flash.agents.external import ExternalAgent, outcome
from flash.agents.plain import PlainStyle
from flash.conversation import TokenSequence
from flash.door import Door
from flash.door.command import CommandAgent
from flash.envs.frozen_lake import FrozenLakeTextEnv
from flash.errors import InferenceFailure, RewardFailure
from flash.fakes import FakeWorker, KeepingObserver
from flash.hub.hub import InferenceHub
from flash.rollout.episode import Episode
from flash.rollout.loop import RolloutLoop
from flash.types import SamplingParams, Task, Weights
from flash.virtual_time import in_virtual_time
from flash.warm_start.demonstrations import to_sample
from flash.warm_start.small_policy import SPECIAL_TOKENS, create
from tests.loops import loop_options


class FakeDoor:
    """A door without HTTP: an agent finds its session by its key and calls `say`."""

    def __init__(self):
        self.sessions = {}
        self.closed = 0

    def open(self, generate, *, max_tokens, temperature, max_sequence_tokens, role="", turns=None):
        session = FakeSession(self, generate, SamplingParams(max_tokens=max_tokens), role, turns)
        session.is_recorded = temperature is not None
        self.sessions[session.api_key] = session
        return session


class FakeSession:
    base_url = "http://fake"
    numbers = itertools.count()

    def __init__(self, door, generate, sampling, role, turns):
        self.api_key = f"key {next(self.numbers)}"
        self.door = door
        self.generate = generate
        self.sampling = sampling
        self.sequence = TokenSequence([], role=role)
        self.turns = turns

    async def say(self, prompt=(1, 2)):
        said = [*self.sequence.token_ids, *prompt]
        completion = await self.generate(said, self.sampling)
        self.sequence.add_prompt(prompt)
        self.sequence.add_sampled(completion, turn=next(self.turns))

    def sequences(self):
        return [self.sequence.snapshot()] if self.sequence.token_ids and self.is_recorded else []

    def close(self):
        self.door.closed += 1


@contextlib.asynccontextmanager
async def rollouts(life, *, worker=None, records=None, timeout_s=100.0, agent=None, **options):
    """A loop of external agents; `life(session, task)` is what each of them does."""
    door = FakeDoor()

    async def act(*, base_url, api_key, task):
        assert base_url == FakeSession.base_url
        return await life(door.sessions[api_key], task)

    def make_agent():
        settings = {"max_tokens": 4, "episode_timeout_s": timeout_s, **(agent or {})}
        return ExternalAgent(door=door, act=act, **settings)

    tasks = (Task(seed, {"own": seed}) for seed in itertools.count())
    options = {"batch_size": 4, "group_size": 2, "alpha": 1, "tasks": tasks, **options}
    if records is not None:
        options["observers"] = [*options.pop("observers", ()), KeepingObserver(records)]
    async with (
        InferenceHub([worker or FakeWorker("w", token_s=(1.0, 1.0), tokens=(4, 4))]) as hub,
        RolloutLoop(hub, agent=make_agent, **loop_options(**options)) as loop,
    ):
        loop.door = door
        yield loop


@in_virtual_time
async def test_an_agents_tokens_come_with_their_experts():
    async def life(session, task):
        for _ in range(3):
            await session.say()
        return 1.0

    worker = FakeWorker("w", token_s=(1.0, 1.0), tokens=(4, 4), experts=2)
    async with rollouts(life, worker=worker, agent={"experts": True}) as loop:
        for sample in (await loop.next_batch()).samples:
            assert sample.experts[:, 0].tolist() == [*range(3 * 6 - 1), -1]


@in_virtual_time
async def test_an_agents_reward_and_tokens_become_samples_under_the_bound():
    async def life(session, task):
        for _ in range(3):
            await session.say()
            await asyncio.sleep(0.5)
        return {"reward": task.seed % 2, "success": task.seed == 3, "notes": "may be there"}

    records = []
    async with rollouts(life, records=records) as loop:
        for version in range(3):
            batch = await loop.next_batch()
            assert len(batch.samples) == 4
            for sample in batch.samples:
                assert sample.num_tokens == 3 * (2 + 4)
                assert sample.loss_mask.sum() == 12
                assert sample.reward == records[-1].seed % 2 or sample.reward in (0, 1)
                assert version - sample.sampled_versions().min() <= 1
            await loop.publish(Weights(version=version + 1, path=Path("/fake")))
    trained = [r for r in records if r.outcome == "trained"]
    assert len(trained) == 12
    for record in trained:
        assert record.reward == record.seed % 2
        assert record.success == (record.seed == 3)
        assert record.turns == 3
        assert record.stages_s["agent"] == pytest.approx(1.5), "its own time only"
        assert record.stages_s["generate"] >= 12
    assert loop.ledger.begun == loop.ledger.outcomes.total()
    assert loop.door.closed == len(loop.door.sessions), "each session is closed"


def test_the_agent_is_told_the_task_with_the_environments_options():
    told = []

    async def life(session, task):
        told.append(task)
        await session.say()
        return 1.0

    async def main():
        async with rollouts(life, agent={"options": {"size": 4, "own": "overruled"}}) as loop:
            await loop.next_batch()

    virtual_time.run(main())
    assert told[0] == Task(0, {"size": 4, "own": 0})


async def raises(session, task):
    await session.say()
    raise KeyError("a bug in the agent")


async def exits(session, task):
    await session.say()
    raise SystemExit(3)


async def interrupts(session, task):
    await session.say()
    raise KeyboardInterrupt


async def cancels_itself(session, task):
    await session.say()
    raise asyncio.CancelledError


async def never_calls(session, task):
    return 1.0


async def has_no_reward(session, task):
    await session.say()


async def hangs(session, task):
    await session.say()
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("life", "kind", "says"),
    [
        (raises, "agent", "the agent raised KeyError('a bug in the agent') in "),
        (exits, "agent", "the agent raised SystemExit(3)"),
        (interrupts, "agent", "the agent raised KeyboardInterrupt()"),
        (cancels_itself, "agent", "the agent cancelled itself"),
        (never_calls, "agent", "the agent never called the model"),
        (has_no_reward, "reward", "the agent answered None"),
        (hangs, "deadline", "episode_timeout_s=100 passed after 1 turns"),
    ],
)
def test_a_failure_is_counted_by_its_kind_and_never_trained(life, kind, says, caplog):
    async def main():
        async with rollouts(life, max_attempts=1) as loop:
            await asyncio.sleep(150)
            others = Counter(loop.ledger.reasons())
            assert others.pop(f"failed({kind})") >= 2
            assert others.keys() <= {"cancelled(group_failed)"}, "what became of their groups"
            assert loop.ledger.ready == 0
            assert loop.crashes == 0
            assert loop.door.closed >= loop.ledger.outcomes.total()

    virtual_time.run(main())
    assert says in caplog.text


def test_the_line_of_the_agents_own_file_is_named(caplog):
    async def main():
        async with rollouts(raises, max_attempts=1) as loop:
            await asyncio.sleep(10)
            assert loop.ledger.count("failed")

    virtual_time.run(main())
    line = raises.__code__.co_firstlineno + 2
    assert f"{Path(__file__).name}, line {line}" in caplog.text


@in_virtual_time
async def test_an_episode_that_is_given_up_cancels_its_agent_and_its_request():
    ended = []

    async def life(session, task):
        try:
            await session.say()
            await asyncio.sleep(1000 if task.seed == 0 else 0)
        except asyncio.CancelledError:
            ended.append(task.seed)
            raise
        return 1.0

    async with rollouts(life, alpha=1, timeout_s=1e6) as loop:
        for version in range(3):
            await loop.next_batch()
            await loop.publish(Weights(version=version + 1, path=Path("/fake")))
        assert ended[:2] == [0, 0]
        assert loop.ledger.reasons()["cancelled(stale)"] >= 2


@in_virtual_time
async def test_an_agent_that_hangs_is_named_with_its_own_line_and_replaced():
    """It has no deadline for a step: only its episode's, which may be far, and the watchdog's."""
    reports, records = [], []

    async def life(session, task):
        await session.say()
        if task.seed == 1 and session.door.closed == 0:
            await asyncio.Event().wait()  # for an answer of its database
        return 1.0

    async with rollouts(
        life, records=records, timeout_s=1e9, alpha=0, on_stall="replace",
        stall_timeout_s=50.0, observers=[KeepingObserver(reports=reports)],
    ) as loop:  # fmt: skip
        batch = await loop.next_batch()
    (report,) = reports
    assert "(seed 1, group 1, attempt 1) in stage 'agent'" in report
    assert "await asyncio.Event().wait()  # for an answer of its database [agent_waits]" in report
    assert Counter((r.outcome, r.reason) for r in records if r.seed == 1) == {
        ("cancelled", "stall"): 2, ("trained", ""): 2,
    }  # fmt: skip
    assert len(batch.samples) == 4


@in_virtual_time
async def test_no_worker_left_ends_the_run_and_blames_no_agent():
    worker = FakeWorker("w")

    async def never_gives_up(session, task):
        while True:
            try:
                await session.say()
            except InferenceFailure:
                await asyncio.sleep(1)

    async with rollouts(never_gives_up, worker=worker, timeout_s=1e6) as loop:
        await asyncio.sleep(1)
        worker.die()
        with pytest.raises(InferenceFailure):
            await loop.next_batch()
        assert loop.ledger.count("failed") == 0


@in_virtual_time
async def test_calls_side_by_side_count_their_time_once():
    async def life(session, task):
        await asyncio.gather(session.say(), session.say())
        await asyncio.sleep(2)
        return 1.0

    records = []
    async with rollouts(life, records=records) as loop:
        await loop.next_batch()
    first = records[0]
    assert first.stages_s["agent"] == pytest.approx(2)
    spent = sum(first.stages_s.values())
    assert spent == pytest.approx(first.ended_s - first.admitted_s)


@in_virtual_time
async def test_a_stage_that_goes_on_in_another_call_is_told_from_its_beginning():
    episode = Episode(0, Task(0), hub=None)
    with contextlib.ExitStack() as second:
        with episode.stage("generate"):
            second.enter_context(episode.stage("generate"))
            await asyncio.sleep(2)
        await asyncio.sleep(1)
        assert "in stage 'generate' for 3.0 s" in episode.describe()


@pytest.mark.parametrize(
    ("answer", "means"),
    [
        (1.0, (1.0, True)),
        (0, (0.0, False)),
        (np.float32(-0.5), (-0.5, False)),
        (np.array(2), (2.0, True)),
        (True, (1.0, True)),
        (False, (0.0, False)),
        ({"reward": 1, "success": np.False_}, (1.0, False)),
        ({"reward": 0.25}, (0.25, True)),
        ({"reward": 0.25, "success": False}, (0.25, False)),
    ],
)
def test_an_answer_is_a_number_or_a_mapping_with_one(answer, means):
    assert outcome(answer) == means


@pytest.mark.parametrize(
    "answer",
    [
        None, "1.0", float("nan"), float("inf"), {}, {"reward": None}, {"reward": "1"},
        {"reward": float("nan")}, {"reward": 1.0, "success": 1}, [1.0],
            b"1", 1j, 1e39, 10**400, np.float64("nan"), np.str_("1.0"), np.array([1.0]),
    ],
)  # fmt: skip
def test_what_holds_no_reward_is_never_a_reward_of_zero(answer):
    with pytest.raises(RewardFailure):
        outcome(answer)


def test_a_long_answer_is_shown_in_short():
    with pytest.raises(RewardFailure) as failure:
        outcome("x" * 1_000_000)
    assert len(str(failure.value)) < 500


# ── through the real door, with the official client ──────────────────────────────────────────


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    words = FrozenLakeTextEnv().vocabulary()
    return AutoTokenizer.from_pretrained(create(folder, words, layers=1, hidden_size=16, heads=2))


async def batches(tokenizer, says, count, **options):
    """What the example's episodes become when the policy answers a prompt with `says(prompt)`."""
    worker = FakeWorker("w", token_s=(0, 0), load_s=(0, 0), script=says)
    records = []
    async with (
        InferenceHub([worker]) as hub,
        Door(hub, tokenizer=tokenizer, model="policy") as door,
        RolloutLoop(
            hub,
            agent=lambda: ExternalAgent(door=door, act=walk, max_tokens=4, options=options),
            tasks=(Task(seed) for seed in itertools.count()),
            batch_size=8,
            group_size=2,
            alpha=1,
            observers=[KeepingObserver(records)],
        ) as loop,
    ):
        for version in range(count):
            yield await loop.next_batch(), records
            await loop.publish(Weights(version=version + 1, path=Path("/fake")))


@pytest.mark.slow
async def test_a_client_that_knows_nothing_of_us_is_trained_on_what_the_plain_style_says(tokenizer):
    style = PlainStyle(tokenizer)
    shown = {}  # the conversation up to each action → the action, as the expert plays
    expert = {}
    for seed in range(40):
        demonstration = FrozenLakeTextEnv().demonstrate(Task(seed))
        sample = to_sample(demonstration, style)
        expert[seed] = sample.token_ids.tolist()
        for at, token in enumerate(expert[seed]):
            if token == style.stop_token_ids[0]:
                shown[tuple(expert[seed][: at - 1])] = expert[seed][at - 1 : at + 1]

    def says(prompt, sampling):
        return shown[tuple(prompt)]

    async for batch, records in batches(tokenizer, says, 2):
        assert len(batch.samples) == 8, "one sample for each episode"
        for sample in batch.samples:
            seed = next(r.seed for r in records if r.episode == sample.episode)
            assert sample.token_ids.tolist() == expert[seed]
            assert sample.reward == 1.0
            stops = sample.token_ids == style.stop_token_ids[0]
            assert sample.loss_mask.sum() == 2 * stops.sum(), "a word and a stop for each action"


@pytest.mark.slow
async def test_the_example_runs_as_a_command_too(tokenizer, tmp_path):
    right = [tokenizer.convert_tokens_to_ids("right"), tokenizer.eos_token_id]
    worker = FakeWorker("w", token_s=(0, 0), script=lambda prompt, sampling: right)
    module = "flash.agents.examples.frozen_lake_openai"
    command = CommandAgent([sys.executable, "-m", module], log_dir=tmp_path)
    async with (
        InferenceHub([worker]) as hub,
        Door(hub, tokenizer=tokenizer, model="policy") as door,
    ):
        agent = ExternalAgent(door=door, act=command, max_tokens=4, options={"max_turns": 3})
        trajectory = await agent.play(Episode(0, Task(0), hub=hub))
    assert 1 <= trajectory.turns <= 3
    assert [sample.loss_mask.sum() for sample in trajectory.sequences] == [2 * trajectory.turns]


async def test_whatever_the_policy_says_an_episode_stays_one_sample(tokenizer):
    rng = random.Random(0)
    vocabulary = range(len(tokenizer))
    stop = tokenizer.eos_token_id
    said = []

    def says(prompt, sampling):
        response = rng.choices(vocabulary, k=rng.randint(1, sampling.max_tokens))
        response = response[: response.index(stop) + 1] if stop in response else response
        said.append(response)
        return response

    async for batch, records in batches(tokenizer, says, 3, max_turns=5):
        assert len(batch.samples) == 8
        turns = {record.episode: record.turns for record in records}
        for sample in batch.samples:
            assert turns[sample.episode] >= 1
            assert (sample.versions[sample.loss_mask > 0] >= batch.version - 1).all()
    special = {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    assert any(special & set(response[:-1]) for response in said), "also what no text shows"
