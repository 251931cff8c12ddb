"""An episode that a crash cut off goes on from the turn it had reached, or starts over."""

import asyncio
import itertools
import random
from dataclasses import fields, replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from flash.agents import Actor, EnvironmentAgent, ExternalAgent, PlainStyle
from flash.environments.hosts import EnvHosts
from flash.environments.inline import InlineEnvs
from flash.envs.alfworld import AlfWorldEnv
from flash.envs.frozen_lake import FrozenLakeTextEnv
from flash.errors import AgentFailure
from flash.fakes import FakeStyle
from flash.rollout.crew import AgentCrew
from flash.rollout.episode import Episode
from flash.rollout.history import difference
from flash.types import (
    Completion,
    Observation,
    SampledSequence,
    SamplingParams,
    Task,
    Trajectory,
)
from flash.virtual_time import in_virtual_time
from flash.warm_start.small_policy import create

TASK = Task(3)
WORLDS = {
    "frozen_lake": (FrozenLakeTextEnv, {"size": 5}),
    "frozen_lake slippery": (FrozenLakeTextEnv, {"size": 5, "slippery": True}),
    "alfworld": (AlfWorldEnv, {"detours": 0.3}),
}
NAMES = {FrozenLakeTextEnv: "frozen_lake", AlfWorldEnv: "alfworld"}  # in the registry


class Log:
    """A witness that keeps what is said, as a log would, and forgets what was begun anew."""

    def __init__(self):
        self.said, self.forgotten = [], []

    def hears(self, event):
        return True

    def observed(self, episode, observation):
        self.said.append(observation)

    def sampled(self, episode, step):
        self.said.append(step)

    def begun_anew(self, episode):
        self.forgotten.append(self.said)
        self.said = []


class TeachersHub:
    """Answers with an expert's actions, turn by turn, and with the same to an equal prompt."""

    def __init__(self, actions):
        self.answers, self.asked = {}, []
        self._actions = iter(actions)
        self._rng = random.Random(7)

    async def generate(self, request, on_start=None, on_sampled=None):
        prompt = tuple(request.token_ids)
        self.asked.append(prompt)
        if prompt not in self.answers:
            tokens = next(self._actions)
            version = len(self.answers) // 2
            self.answers[prompt] = Completion(
                token_ids=tokens,
                logprobs=[-self._rng.random() for _ in tokens],
                versions=[version] * len(tokens),
                temperature=1.0,
                finish_reason="stop",
                worker="w",
            )
        on_start(self.answers[prompt].versions[0])
        return self.answers[prompt]

    def forget(self, session): ...


@pytest.fixture(scope="module", params=list(WORLDS))
def world(request, tmp_path_factory):
    """An environment's class and options, a style that speaks its words, its expert's actions."""
    kind, options = WORLDS[request.param]
    env = kind(**options)
    folder = create(
        tmp_path_factory.mktemp("policy"), env.vocabulary(), layers=1, hidden_size=16, heads=2
    )
    style = PlainStyle(AutoTokenizer.from_pretrained(folder))
    # Of a way that is planned for ice that is not slippery any number may be needed.
    ways = itertools.cycle(env.demonstrate(TASK)[:40])
    return kind, options, style, (style.spell(turn.action) for turn in ways)


async def live(agent, hub, *, history=()):
    """One episode in a crew of such agents: itself, its end, and what was said in it."""
    ends, log = [], Log()
    crew = AgentCrew(lambda: agent, hub)
    ended = asyncio.Event()

    def on_end(episode, end):
        ends.append(end)
        ended.set()

    def on_fatal(error):
        on_end(None, error)

    crew.report_to(on_end=on_end, on_fatal=on_fatal, witness=log)
    async with crew:
        episode = crew.begin(5, TASK, group=2, history=history)
        await ended.wait()
    (end,) = ends
    return episode, end, log


def counted(episode):
    return (
        episode.turns, episode.prompt_tokens, episode.generated_tokens,
        episode.oldest_version, episode.newest_version,
    )  # fmt: skip


def assert_equal(one, other):
    """Trajectories, to the last bit."""
    assert replace(one, sequences=[]) == replace(other, sequences=[])
    assert len(one.sequences) == len(other.sequences)
    for a, b in zip(one.sequences, other.sequences, strict=True):
        for field in fields(SampledSequence):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


@pytest.mark.parametrize("samples", ["whole", "turns"])
async def test_one_that_is_cut_off_anywhere_goes_on_to_the_same_end(world, samples):
    kind, options, style, actions = world
    hub = TeachersHub(actions)

    async def played(history=()):
        envs = InlineEnvs(lambda: kind(**options))
        agent = EnvironmentAgent(
            envs=envs, style=style, max_tokens=16, samples=samples, max_turns=12
        )
        hub.asked.clear()
        return await live(agent, hub, history=history)

    whole, end, log = await played()
    assert isinstance(end, Trajectory)
    assert whole.turns > 3
    assert len(end.sequences) == (1 if samples == "whole" else whole.turns)
    for cut in range(len(log.said) + 1):
        again, same_end, same_log = await played(log.said[:cut])
        assert_equal(same_end, end)
        assert counted(again) == counted(whole)
        assert (same_log.said, same_log.forgotten) == (log.said, [])
        # A history is observation, response, observation, …: half of it need not be sampled.
        assert len(hub.asked) == whole.turns - cut // 2


@pytest.mark.slow
async def test_one_that_was_begun_in_this_process_goes_on_in_a_host(world, tmp_path):
    kind, options, style, actions = world
    hub = TeachersHub(actions)
    settings = {"style": style, "max_tokens": 16, "max_turns": 12}
    inline = InlineEnvs(lambda: kind(**options))
    whole, end, log = await live(EnvironmentAgent(envs=inline, **settings), hub)
    async with EnvHosts(
        NAMES[kind], options, hosts=1, call_timeout_s=60.0, log_dir=tmp_path
    ) as hosted:  # whose process has hashes of its own
        for cut in (0, 1, 4, len(log.said) - 1):
            hub.asked.clear()
            agent = EnvironmentAgent(envs=hosted, **settings)
            again, same_end, same_log = await live(agent, hub, history=log.said[:cut])
            assert_equal(same_end, end)
            assert counted(again) == counted(whole)
            assert (same_log.said, same_log.forgotten) == (log.said, [])
            assert len(hub.asked) == whole.turns - cut // 2


# ── what differs ─────────────────────────────────────────────────────────────────────────────


class Counting:
    """Says how often it was asked; reward 1 at the end, after four steps."""

    metadata = {"deterministic": True}  # noqa: RUF012

    def __init__(self, changes=None):
        self.changes = changes or {}  # of the answer to a step: the place in it, and the value

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return f"begin {seed}", {"goal": "count", "admissible_commands": ["one", "two"]}

    def step(self, action):
        self.steps += 1
        over = self.steps == 4
        answer = [f"step {self.steps}", float(over), over, False, {"goal": "count"}]
        if over:
            answer[4]["success"] = True
        for place, value in self.changes.get(self.steps, {}).items():
            answer[place] = value
        return tuple(answer)

    def close(self): ...


class LengthStyle(FakeStyle):
    """Shows how long a text is, and nothing else of it."""

    def __init__(self, mark=2):
        self.mark = mark

    def first(self, observation):
        return [self.mark, len(observation.text)]

    def next(self, observation, sampled):
        return [self.mark, len(observation.text)]


class Envs(InlineEnvs):
    """Counts those that are open and those that were opened."""

    def __init__(self, make):
        super().__init__(make)
        self.opened = self.closed = 0

    async def open(self):
        self.opened += 1
        env = await super().open()
        close = env.close

        def closing():
            self.closed += 1
            close()

        env.close = closing
        return env


async def counting(*, history=(), changes=None, make=Counting, style=None, hub=None, **options):
    """An episode in such an environment, with the hub and the environments that it had."""
    hub = hub or TeachersHub([n, n, 1] for n in itertools.count(10))
    envs = Envs(lambda: make(changes))
    agent = EnvironmentAgent(
        envs=envs, style=style or LengthStyle(), **{"max_tokens": 4, **options}
    )
    episode, end, log = await live(agent, hub, history=history)
    assert envs.opened == envs.closed
    return episode, end, log, hub, envs


DIFFERENT = {
    "a text": ({0: "step 7"}, "text[5:] is '7', and '2' was logged"),
    "a shorter text": ({0: "step"}, "text[4:] is '', and ' 2' was logged"),
    "a reward": ({1: 0.25}, "reward is 0.25, and 0.0 was logged"),
    "an end": ({2: True}, "terminated is True, and False was logged"),
    "a cut": ({3: True}, "truncated is True, and False was logged"),
    "a goal": ({4: {"goal": "win"}}, "goal is 'win', and 'count' was logged"),
    "no goal": ({4: {}}, "goal is None, and 'count' was logged"),
    "commands": (
        {4: {"goal": "count", "admissible_commands": ["go"]}},
        "admissible_commands is ['go'], and None was logged",
    ),
    "success": ({4: {"goal": "count", "success": False}}, "success is False, and None was logged"),
}


@pytest.mark.parametrize("name", DIFFERENT)
@in_virtual_time
async def test_what_the_environment_answers_differently_has_it_start_over(name, caplog):
    change, told = DIFFERENT[name]
    _, _, log, _, _ = await counting()
    other, plain_end, plain_log, plain_hub, _ = await counting(changes={2: change})
    caplog.clear()
    again, end, said, hub, envs = await counting(changes={2: change}, history=log.said)
    # As if it had never had a history: played from nothing, in another environment.
    assert_equal(end, plain_end)
    assert counted(again) == counted(other)
    assert (said.said, hub.asked) == (plain_log.said, plain_hub.asked)
    assert said.forgotten == [log.said[:4]]
    assert envs.opened == 2
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert warning.getMessage() == (
        "episode 5 (seed 3, group 2, attempt 1) starts over, after 2 turns of its history: " + told
    )


@in_virtual_time
async def test_other_prompts_have_it_start_over(caplog):
    _, _, log, _, _ = await counting()
    again, end, said, hub, envs = await counting(style=LengthStyle(mark=7), history=log.said)
    assert isinstance(end, Trajectory)
    assert again.turns == len(hub.asked) == 4
    assert len(said.said) == 9
    assert said.forgotten == [log.said[:1]]
    assert envs.opened == 2
    (warning,) = caplog.records
    assert "after 0 turns of its history: the prompt, of 2 tokens now, is not" in warning.message


@in_virtual_time
async def test_a_logged_response_that_is_longer_than_one_may_be_has_it_start_over(caplog):
    _, _, log, _, _ = await counting()
    short = TeachersHub([n, 1] for n in itertools.count(10))
    again, end, _, _, _ = await counting(max_tokens=2, hub=short, history=log.said)
    assert isinstance(end, Trajectory)
    assert again.generated_tokens == 2 * again.turns
    assert "the logged response has 3 tokens, and now it may have 2" in caplog.text


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        (0, "the environment is asked where a response was logged"),
        (1, "the policy is asked where an observation was logged"),
    ],
)
@in_virtual_time
async def test_a_history_with_a_hole_is_told_and_not_believed(lost, told, caplog):
    _, plain_end, log, _, _ = await counting()
    _, end, _, hub, _ = await counting(history=log.said[:lost] + log.said[lost + 1 :])
    assert_equal(end, plain_end)
    assert len(hub.asked) == 4
    assert told in caplog.text


@pytest.mark.parametrize("attribute", [{}, {"deterministic": False}, {"deterministic": "yes"}])
@in_virtual_time
async def test_where_the_environment_does_not_promise_it_a_history_is_not_used(attribute, caplog):
    class Chance(Counting):
        metadata = attribute

    _, _, log, _, _ = await counting(changes={2: {0: "tails"}})
    _, plain_end, _, _, _ = await counting()
    again, end, said, hub, envs = await counting(make=Chance, history=log.said)
    assert_equal(end, plain_end)
    assert again.turns == len(hub.asked) == 4
    assert (said.forgotten, envs.opened, caplog.records) == ([], 1, [])


@in_virtual_time
async def test_an_agent_that_does_not_ask_for_it_has_no_history():
    _, _, log, _, _ = await counting()
    hub = TeachersHub([n, 1] for n in itertools.count(50))

    class Session:
        base_url, api_key = "http://fake", "key"

        def close(self): ...

        def sequences(self):
            return [SampledSequence(**dict.fromkeys([f.name for f in fields(SampledSequence)]))]

    class Door:
        def open(self, generate, **options):
            self.generate = generate
            return Session()

    async def act(*, base_url, api_key, task):
        answer = await door.generate([2, 7], SamplingParams(max_tokens=4))
        assert answer.token_ids == [50, 1]
        return 1.0

    door = Door()
    agent = ExternalAgent(door=door, act=act, max_tokens=4)
    _, end, said = await live(agent, hub, history=log.said)
    assert end.reward == 1.0
    assert hub.asked == [(2, 7)]
    assert len(said.said) == 1


@in_virtual_time
async def test_an_agent_that_crashes_amid_its_history_fails_the_episode():
    _, _, log, _, _ = await counting()

    class Faulty(LengthStyle):
        def action(self, sampled):
            if sampled[0] == 11:
                raise KeyError("a bug")
            return super().action(sampled)

    again, end, said, hub, _ = await counting(style=Faulty(), history=log.said)
    assert isinstance(end, AgentFailure)
    assert "a bug" in str(end)
    assert said.said == log.said[:4]
    assert (again.turns, hub.asked) == (2, [])
    # The next attempt has none, and nothing is left of it.
    _, end, said, hub, _ = await counting()
    assert isinstance(end, Trajectory)
    assert len(hub.asked) == 4


@in_virtual_time
async def test_settings_that_end_an_episode_earlier_end_it_within_its_history():
    _, _, log, _, _ = await counting()
    again, end, said, hub, _ = await counting(max_turns=2, history=log.said)
    assert (end.turns, again.turns, hub.asked) == (2, 2, [])
    assert said.said == log.said[:5]


@in_virtual_time
async def test_a_long_history_lets_others_run_between_its_turns():
    _, _, log, _, _ = await counting()
    turns = []

    class Watched(Log):
        def sampled(self, episode, step):
            super().sampled(episode, step)
            turns.append(beats)

    beats = 0
    agent = EnvironmentAgent(envs=InlineEnvs(Counting), style=LengthStyle(), max_tokens=4)
    episode = Episode(1, TASK, hub=TeachersHub([]), history=log.said, witness=Watched())
    playing = asyncio.create_task(agent.play(episode))
    while not playing.done():
        beats += 1
        await asyncio.sleep(0)
    assert len(set(turns)) == 4


@in_virtual_time
async def test_an_episode_that_starts_over_has_no_more_time_for_it():
    _, _, log, _, _ = await counting()

    class Twice(Actor):
        """Meets a difference, and plays for 30 s then."""

        plays = 0

        async def play(self, episode):
            self.plays += 1
            if self.plays == 1:
                episode.replay_history()
                await asyncio.sleep(30)
                episode.observe(Observation(text="other"))
            await asyncio.sleep(30)
            return Trajectory(sequences=[], reward=0.0, turns=0)

    agent = Twice(episode_timeout_s=50.0)
    _, end, _ = await live(agent, TeachersHub([]), history=log.said)
    assert agent.plays == 2
    assert "episode_timeout_s=50 passed" in str(end)


def test_observations_differ_only_in_what_can_be_seen():
    seen = Observation(text="t", info={"goal": "g", "admissible_commands": ["a", "b"], "more": 1})
    read_back = Observation(
        text="t", info={"goal": "g", "admissible_commands": ("a", "b"), "success": None}
    )
    assert difference(seen, read_back) == ""
    long = Observation(text="x" * 5000 + "y" + "z" * 5000)
    told = difference(long, replace(long, text="x" * 10_001))
    assert told.startswith("text[5000:] is 'yzz")
    assert len(told) < 300
