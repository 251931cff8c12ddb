"""The simulated episodes: scripts of what will happen, and environments and a style that play them.

Hub and agents handle tokens as lists, in time that grows with their lengths. So an entry of such a
list stands for `grain` tokens, and holds the number of its episode's script: a worker that is
given a prompt knows from it which episode it samples for.
"""

import asyncio
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from flash.errors import EnvFailure
from flash.simulate.replay import RecordedEpisode, Replay, cut_off, played
from flash.simulate.scenario import Scenario
from flash.simulate.timeline import Timeline
from flash.types import AsyncEnv, Observation, Task

_SCRIPT = "script"  # where an observation's `info` has the script


@dataclass(slots=True, eq=False)
class Script:
    """What will happen in one episode: drawn once, whatever the schedule is.

    `context` counts the entries of the conversation before the present response.
    """

    number: int
    task: int
    prompt_tokens: int
    reset_s: float
    reward_s: float
    reward: float
    response_tokens: list[int] = field(default_factory=list)
    observation_tokens: list[int] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    call_luck: list[float] = field(default_factory=list)
    turn: int = 0
    context: int = 0

    @property
    def turns(self) -> int:
        return len(self.response_tokens)


class World:
    """Draws the scripts. The n-th episode of a task is the same one in every simulation of a seed,
    so that two scenarios are compared on the same work."""

    def __init__(self, scenario: Scenario) -> None:
        self.grain = scenario.tokens_as_one()
        self._seed = scenario.seed
        self._workload = workload = scenario.workload
        self._episodes_of: Counter[int] = Counter()
        self._scripts: dict[int, Script] = {}
        self._numbers = 0
        self._replay: Replay | None = None
        if (run := workload.replay) is not None:
            self._replay = Replay(played(run), cut_off(run))
        self._prompt_tokens = workload.prompt_tokens.sampler()
        self._response_tokens = workload.response_tokens.sampler()
        self._observation_tokens = workload.observation_tokens.sampler()
        self._response_scale = workload.response_scale.sampler()
        self._turns = workload.turns.sampler()
        self._reset_s = workload.env_reset_s.sampler()
        self._step_s = workload.env_step_s.sampler()
        self._step_scale = workload.env_step_scale.sampler()
        self._reward_s = workload.reward_s.sampler()

    def begin(self, task: int) -> Script:
        """The task's next episode."""
        attempt = self._episodes_of[task]
        self._episodes_of[task] += 1
        of_task = random.Random(f"{self._seed} {task}")
        prompt_tokens = self._prompt_tokens.draw(of_task)
        length = self._response_scale.draw(of_task)
        rng = random.Random(f"{self._seed} {task} {attempt}")
        self._numbers += 1
        script = Script(
            number=self._numbers,
            task=task,
            prompt_tokens=max(1, round(prompt_tokens)),
            reset_s=self._reset_s.draw(rng),
            reward_s=self._reward_s.draw(rng),
            reward=float(rng.random() < self._workload.success_rate),
        )
        if self._replay is None:
            self._draw_turns(script, rng, length)
        else:
            self._replay_turns(script, self._replay.episode(task, attempt, rng))
        script.observation_tokens = [
            round(self._observation_tokens.draw(rng)) for _ in script.step_s
        ]
        script.call_luck = [rng.random() for _ in range(script.turns + 1)]
        self._scripts[script.number] = script
        return script

    def _draw_turns(self, script: Script, rng: random.Random, length: float) -> None:
        turns = range(max(1, round(self._turns.draw(rng))))
        scale = self._step_scale.draw(rng)
        script.response_tokens = [
            max(1, round(length * self._response_tokens.draw(rng))) for _ in turns
        ]
        script.step_s = [scale * self._step_s.draw(rng) for _ in turns]

    def _replay_turns(self, script: Script, episode: RecordedEpisode) -> None:
        """Of an episode only totals are known: its turns are made equal."""
        turns = episode.turns
        each, more = divmod(episode.generated_tokens, turns)
        script.response_tokens = [max(1, each + (turn < more)) for turn in range(turns)]
        script.step_s = [episode.env_s / turns] * turns
        script.reward_s = episode.reward_s
        script.reward = episode.reward or 0.0

    def script(self, number: int) -> Script:
        """The script whose number the tokens of a prompt are."""
        return self._scripts[number]

    def end(self, script: Script) -> None:
        """Its environment was closed."""
        del self._scripts[script.number]

    def entries(self, tokens: int) -> int:
        """How many entries of a list stand for so many tokens."""
        return math.ceil(tokens / self.grain)


class SimulatedEnvs:
    """Environments that play scripts."""

    def __init__(self, scenario: Scenario, world: World, timeline: Timeline | None) -> None:
        self.world = world
        self.timeline = timeline
        self.hang_below = scenario.workload.env_hang_rate
        self.fail_below = self.hang_below + scenario.workload.env_fail_rate

    async def open(self) -> AsyncEnv:
        return _SimulatedEnv(self)

    async def reward(self, seen: Sequence[Observation]) -> float:
        """The reward stage."""
        script: Script = seen[0].info[_SCRIPT]
        if script.reward_s:
            await asyncio.sleep(script.reward_s)
        if self.timeline is not None:
            self.timeline.episode(script.number, "reward", script.reward_s)
        return script.reward


class _SimulatedEnv:
    deterministic = False  # each episode of a task has a script of its own

    def __init__(self, envs: SimulatedEnvs) -> None:
        self._envs = envs
        self._script: Script | None = None

    async def reset(self, task: Task) -> Observation:
        self._script = script = self._envs.world.begin(task.seed)
        if self._envs.timeline is not None:
            self._envs.timeline.episode_began(script.number)
        await self._call(script, script.reset_s, luck=script.call_luck[-1])
        return Observation(text="", info={_SCRIPT: script})

    async def step(self, action: str) -> Observation:
        script = self._script
        assert script is not None
        turn = script.turn
        await self._call(script, script.step_s[turn], luck=script.call_luck[turn])
        script.turn += 1
        return Observation(text="", terminated=script.turn == script.turns, info={_SCRIPT: script})

    async def _call(self, script: Script, seconds: float, *, luck: float) -> None:
        if luck < self._envs.hang_below:
            await asyncio.Event().wait()
        if seconds:
            await asyncio.sleep(seconds)
        if self._envs.timeline is not None:
            self._envs.timeline.episode(script.number, "env", seconds)
        if luck < self._envs.fail_below:
            raise EnvFailure("the scenario's env_fail_rate")

    def close(self) -> None:
        if self._script is not None:
            self._envs.world.end(self._script)
            if self._envs.timeline is not None:
                self._envs.timeline.episode_ended(self._script.number)


class SimulatedStyle:
    """Tokens of the right number; they say only whose they are."""

    stop_token_ids: tuple[int, ...] = ()

    def __init__(self, world: World) -> None:
        self._world = world

    def first(self, observation: Observation) -> list[int]:
        script: Script = observation.info[_SCRIPT]
        script.context = self._world.entries(script.prompt_tokens)
        return [script.number] * script.context

    def next(self, observation: Observation, sampled: Sequence[int]) -> list[int]:
        script: Script = observation.info[_SCRIPT]
        tokens = self._world.entries(script.observation_tokens[script.turn - 1])
        script.context += len(sampled) + tokens
        return [script.number] * tokens

    def action(self, sampled: Sequence[int]) -> str:
        return ""
