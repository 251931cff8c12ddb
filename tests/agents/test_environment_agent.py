"""Episodes in an environment: how long they may be, and what befalls one alone."""

import asyncio
import contextlib
import itertools
import logging
import sys
import threading
from collections import Counter

import numpy as np
import pytest

from flash.agents import EnvironmentAgent
from flash.conversation import TokenSequence
from flash.environments.inline import InlineEnvs
from flash.errors import AgentFailure, EnvFailure, RewardFailure
from flash.fakes import FakeStyle, FakeWorker, KeepingObserver
from flash.hub.hub import InferenceHub
from flash.hub.worker import BadRequest
from flash.rollout.episode import Episode
from flash.rollout.loop import RolloutLoop
from flash.types import Completion, Task
from flash.virtual_time import in_virtual_time
from tests.loops import loop_options

SAID = [70, 75, 1]
LIMIT = 20


class LetterStyle(FakeStyle):
    """A token for each character, and one before the agent speaks; it notes who calls it."""

    def __init__(self):
        self.read: list[tuple[int, str]] = []

    def first(self, observation):
        self.read.append((len(observation.text), threading.current_thread().name))
        return [10] * len(observation.text) + [2]

    def next(self, observation, sampled):
        return self.first(observation)


class Says:
    """Begins with the first text, and answers each action with the next; reward 1 for each."""

    def __init__(self, *texts, first="abc"):
        self.texts, self.start = iter(texts), first

    def reset(self, *, seed=None, options=None):
        return self.start, {}

    def step(self, action):
        return next(self.texts), 1.0, False, False, {}

    def close(self): ...


async def played(env, style=None, **options):
    """The trajectory of an episode in which three tokens are sampled each turn."""
    worker = FakeWorker("w", token_s=(0, 0), script=lambda prompt, _: SAID, experts=2)
    agent = EnvironmentAgent(
        envs=InlineEnvs(lambda: env), style=style or LetterStyle(), max_tokens=3,
        **{"max_sequence_tokens": LIMIT} | options,
    )  # fmt: skip
    async with InferenceHub([worker]) as hub:
        return await agent.play(Episode(1, Task(0), hub=hub))


@pytest.mark.parametrize("samples", ["whole", "turns"])
@in_virtual_time
async def test_an_observation_that_leaves_no_room_ends_the_episode_before_it(samples):
    # 4 + 3, then 6 + 3 of 20: of the 4 that are left no observation may take all.
    trajectory = await played(Says("fives", "thr"), samples=samples)
    assert trajectory.turns == 2
    assert trajectory.reward == 2.0
    assert trajectory.turn_rewards == [1.0, 1.0]
    assert trajectory.turn_states == ["abc", "fives"]
    for sequence in trajectory.sequences:
        assert sequence.num_tokens <= LIMIT
        assert sequence.token_ids[-3:].tolist() == SAID
        assert sequence.loss_mask[-3:].tolist() == [1, 1, 1]
    assert trajectory.sequences[-1].num_tokens == 16


@in_virtual_time
async def test_an_observation_that_leaves_room_for_one_token_is_read():
    trajectory = await played(Says("fives", "in", "out"))
    assert trajectory.turns == 3
    (sequence,) = trajectory.sequences
    assert sequence.num_tokens == LIMIT
    assert sequence.loss_mask.tolist() == [0] * 4 + [1] * 3 + [0] * 6 + [1] * 3 + [0] * 3 + [1]


@in_virtual_time
async def test_the_last_turn_that_is_allowed_is_followed_by_no_observation():
    style = LetterStyle()
    trajectory = await played(Says("x", "y"), style, max_turns=2)
    (sequence,) = trajectory.sequences
    assert sequence.loss_mask[-3:].tolist() == [1, 1, 1]
    assert [length for length, _ in style.read] == [3, 1]


async def test_what_can_not_fit_is_not_tokenised_and_what_is_long_not_in_the_event_loop():
    style = LetterStyle()
    trajectory = await played(
        Says("word " * 5000, "word " * 11_000_000), style, max_sequence_tokens=30_000
    )
    assert trajectory.turns == 2
    (_, here), (length, elsewhere) = style.read
    assert (here, length) == (threading.main_thread().name, 25_000)
    assert elsewhere != here


async def test_a_text_of_which_only_the_beginning_is_known_never_fits():
    style = LetterStyle()
    trajectory = await played(Says("word " * 11_000_000), style, max_sequence_tokens=10_000_000)
    assert trajectory.turns == len(style.read) == 1


@pytest.mark.parametrize(
    ("first", "failure", "says"),
    [
        ("x" * 20, AgentFailure, "the first prompt has 21 tokens, which leaves no room to answer"),
        (
            "word " * 11_000_000,
            EnvFailure,
            "reset answered 4000001 characters, more than the 640 t",
        ),
    ],
)
@in_virtual_time
async def test_a_first_observation_that_leaves_no_room_fails_the_episode(first, failure, says):
    with pytest.raises(failure, match=says):
        await played(Says(first=first))


@in_virtual_time
async def test_rewards_whose_sum_is_no_number_fail_the_episode():
    class Rich(Says):
        def step(self, action):
            return "", 3e38, False, False, {}

    with pytest.raises(RewardFailure, match=r"the environment answered 6e\+38"):
        await played(Rich(), max_turns=2)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("1 / 0", "the reward raised ZeroDivisionError"),
        ("exit(1)", "the reward raised SystemExit"),
        ("'1.0'", "the reward answered '1.0': it must be a finite number"),
    ],
)
@in_virtual_time
async def test_a_reward_function_that_gives_none_fails_the_episode(code, says):
    async def reward(seen):
        return eval(code)

    with pytest.raises(RewardFailure, match=says):
        await played(Says("x"), reward=reward, max_turns=1)


@contextlib.asynccontextmanager
async def rollouts(env, records, worker=None):
    worker = worker or FakeWorker("w", script=lambda prompt, _: SAID)
    envs, style = InlineEnvs(env), LetterStyle()
    async with (
        InferenceHub([worker]) as hub,
        RolloutLoop(
            hub,
            agent=lambda: EnvironmentAgent(
                envs=envs, style=style, max_tokens=3, max_sequence_tokens=LIMIT, max_turns=2
            ),
            tasks=(Task(seed) for seed in itertools.count()),
            **loop_options(
                batch_size=4, group_size=2, alpha=0, observers=[KeepingObserver(records)]
            ),
        ) as loop,
    ):
        yield loop


@pytest.mark.parametrize(
    "slip",
    [
        lambda: ("x", float("nan"), False, False, {}),
        lambda: ("x", "1.0", False, False, {}),
        lambda: sys.exit(0),
        lambda: next(iter(())),
        lambda: ("\udcff", 1.0, False, False, {}),
    ],
    ids=["nan", "text", "exit", "stop iteration", "surrogate"],
)
def test_a_slip_of_the_environment_fails_one_episode_and_the_run_goes_on(slip, caplog):
    steps = itertools.count()

    class Slips(Says):
        def step(self, action):
            return slip() if next(steps) == 5 else ("x", 1.0, False, False, {})

    @in_virtual_time
    async def main():
        async with rollouts(Slips, records := []) as loop:
            batch = await loop.next_batch()
            assert loop.crashes == 0
        return batch, Counter((r.outcome, r.reason) for r in records)

    batch, outcomes = main()
    assert {sample.reward for sample in batch.samples} == {2.0}
    assert outcomes["failed", "env"] == 1
    assert outcomes["trained", ""] == 4


def test_a_close_that_raises_harms_no_finished_episode_and_is_told_once(caplog):
    class Clumsy(Says):
        def step(self, action):
            return "x", 1.0, True, False, {}

        def close(self):
            raise OSError("the window is gone")

    @in_virtual_time
    async def main():
        async with rollouts(Clumsy, records := []) as loop:
            await loop.next_batch()
        return {r.outcome for r in records}

    assert main() <= {"trained", "cancelled"}
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert ["close raised OSError('the window is gone')" in text for text in told] == [True]


def test_a_request_that_no_worker_takes_fails_its_episode_alone():
    class Picky(FakeWorker):
        async def generate(self, request_id, token_ids, *rest):
            if len(token_ids) == 9:  # 4 + 3, then an observation of one character
                raise BadRequest("9 tokens are more than I read")
            return await super().generate(request_id, token_ids, *rest)

    steps = itertools.count()

    class Grows(Says):
        def step(self, action):
            return "x" if next(steps) == 0 else "xx", 1.0, False, False, {}

    @in_virtual_time
    async def main():
        async with rollouts(
            Grows, records := [], Picky("w", script=lambda prompt, _: SAID)
        ) as loop:
            batch = await loop.next_batch()
            assert loop.crashes == 0
        return batch, Counter((r.outcome, r.reason) for r in records)

    batch, outcomes = main()
    assert len(batch.samples) == 4
    assert outcomes["failed", "agent"] == 1


async def test_an_episode_that_is_given_up_while_a_text_is_tokenised_ends_at_once():
    began, release = threading.Event(), threading.Event()

    class Slow(LetterStyle):
        def next(self, observation, sampled):
            began.set()
            release.wait()
            return super().next(observation, sampled)

    episode = asyncio.create_task(played(Says("word " * 5000), Slow(), max_sequence_tokens=30_000))
    try:
        await asyncio.to_thread(began.wait)
        episode.cancel()
        with pytest.raises(asyncio.CancelledError):
            await episode
    finally:
        release.set()


def test_what_was_read_after_the_last_sampled_token_is_no_part_of_a_sample():
    conversation = TokenSequence([2, 3])
    conversation.add_sampled(
        Completion(
            token_ids=[70, 1], logprobs=[-0.5, -0.1], versions=[4, 4], temperature=1.0,
            finish_reason="stop",
        )
    )  # fmt: skip
    before = conversation.snapshot()
    conversation.add_prompt([5, 6])
    after = conversation.snapshot()
    assert after.token_ids.tolist() == before.token_ids.tolist() == [2, 3, 70, 1]
    assert len(after.turns) == len(after.versions) == len(after.logprobs) == 4
    assert conversation.token_ids == [2, 3, 70, 1, 5, 6], "it may be continued"


@pytest.mark.parametrize("samples", ["whole", "turns"])
@in_virtual_time
async def test_the_experts_of_all_that_was_read_and_said_are_kept(samples):
    """Each is asked for once; of the last token of an episode nobody knows them."""
    trajectory = await played(Says("a", "b"), samples=samples, max_turns=2, experts=True)
    ends = [len(sequence.token_ids) for sequence in trajectory.sequences]
    assert len(ends) == (1 if samples == "whole" else 2)
    for sequence, end in zip(trajectory.sequences, ends, strict=True):
        assert sequence.experts[:, 0].tolist() == [*range(end - 1), -1]
        assert sequence.experts.shape == (end, 2)
    without = await played(Says("a", "b"), samples=samples, max_turns=2)
    assert all(sequence.experts is None for sequence in without.sequences)


def test_experts_that_are_told_twice_stay_as_they_were_sampled_with_and_gaps_are_not_known():
    conversation = TokenSequence([2, 3])

    def said(*experts):
        return Completion(
            token_ids=[5, 6], logprobs=[-1.0, -1.0], versions=[0, 0], temperature=1.0,
            finish_reason="length", experts=np.array(experts, np.int16).reshape(-1, 1),
        )  # fmt: skip

    conversation.add_sampled(said(10, 11, 12))
    assert conversation.experts_from == 3
    going_on = conversation.going_on()
    conversation.add_sampled(said(20, 21, 22, 23, 24))
    assert conversation.snapshot().experts[:, 0].tolist() == [10, 11, 12, 23, 24, -1]
    going_on.add_prompt([7, 7])
    going_on.add_sampled(said(35, 36))
    assert going_on.snapshot().experts[:, 0].tolist() == [10, 11, 12, -1, -1, 35, 36, -1]


@pytest.mark.parametrize(("kept", "experts"), [(2, [0, 1, 2]), (1, [0, 1]), (0, [0])])
def test_what_is_cut_of_a_completion_takes_its_experts_along(kept, experts):
    whole = Completion(
        token_ids=[5, 6], logprobs=[-1.0, -2.0], versions=[0, 1], temperature=1.0,
        finish_reason="length", experts=np.arange(3, dtype=np.int16)[:, None],
    )  # fmt: skip
    cut = whole.cut(kept)
    assert (cut.token_ids, cut.versions) == ([5, 6][:kept], [0, 1][:kept])
    assert cut.experts[:, 0].tolist() == experts
