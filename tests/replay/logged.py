"""A run's folder with a log that a Store wrote: nothing was played for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from flash.conversation import TokenSequence
from flash.log.schema import (
    BATCHES,
    COMPLETIONS,
    EPISODES,
    GROUPS,
    OBSERVATIONS,
    SAMPLES,
    SEQUENCES,
    STARTS,
    STEPS,
)
from flash.log.store import Change, Store, sqlite_url
from flash.trainer.config import TrainerConfig
from flash.types import Completion

WORDS = ["go", "north", "south", "a", "room", "garden", "stop", "\x1b[2J"]
RUN_ID = "a" * 32
BEGAN = 1_800_000_000.0


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


class Logged:
    """A run whose log grows as a test says. Each episode's turns are (read, said) texts."""

    def __init__(self, folder: Path, *, url: str = "", **config) -> None:
        self.path = folder / "run"
        model = folder / "model"
        model.mkdir(parents=True)
        tokenizer = Tokenizer(WordLevel(dict(zip(WORDS, range(len(WORDS)), strict=True))))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        tokenizer.add_special_tokens(["stop"])
        tokenizer.save(str(model / "tokenizer.json"))
        self.path.mkdir()
        (self.path / "log.id").write_text(RUN_ID)
        kept = {"model": str(model), "log": {"url": url}, "reward": {"name": "env"}, **config}
        (self.path / "config.yaml").write_text(yaml.safe_dump(kept))
        self.store = Store(url or sqlite_url(self.path), run=RUN_ID, name="run")
        self.store.own()
        self._groups: set[int] = set()

    def insert(self, table, **values) -> None:
        self.store.commit([Change("insert", table, values)])

    def begin(self, episode: int, *, group: int = 0, continues: int | None = None) -> None:
        if group not in self._groups:
            self._groups.add(group)
            self.insert(
                GROUPS, group=group, start=1, seed=70 + group, options={"size": 4}, begun_at=BEGAN
            )
        self.insert(
            EPISODES, episode=episode, group=group, attempt=1, start=1, seed=70 + group,
            continues=continues, admitted_at=BEGAN,
        )  # fmt: skip

    def observe(self, episode: int, step: int, text: str, reward: float = 0.0, **values) -> None:
        ended = {"terminated": False, "truncated": False, "info": {}}
        self.insert(
            OBSERVATIONS, episode=episode, step=step, at=BEGAN + step / 4, text=text,
            reward=reward, **ended | values,
        )  # fmt: skip

    def sample(self, episode: int, step: int, text: str, version: int = 0) -> None:
        said = ids(text)
        self.insert(
            COMPLETIONS, episode=episode, step=step, at=BEGAN + step / 4, prompt_sum=1,
            token_ids=said, logprobs=[-0.5] * len(said), versions=[version] * len(said),
            temperature=1.0, finish_reason="stop", worker="w",
        )  # fmt: skip

    def play(
        self,
        episode: int,
        *turns: tuple[str, str],
        reward: float = 0.0,
        group: int = 0,
        logprobs: tuple[float, ...] = (-0.05, -0.5, -5.0),
        version: int = 2,
        outcome: str = "trained",
        reason: str = "",
        roles: Sequence[str] = ("",),
        role_rewards: Mapping[str, float] | None = None,
    ) -> None:
        """From its beginning to its end; it observes what it reads, and "garden" at last. Who has
        one of `roles` speaks in turn, each in a sequence of its own."""
        self.begin(episode, group=group)
        sequences = {role: TokenSequence([], role=role) for role in roles}
        for number, (read, said) in enumerate(turns):
            sequence = sequences[roles[number % len(roles)]]
            sequence.add_prompt(ids(read))
            told = ids(said)
            sequence.add_sampled(
                Completion(
                    token_ids=told, logprobs=list(logprobs[: len(told)]),
                    versions=[version] * len(told), temperature=1.0, finish_reason="stop",
                ),
                turn=number,
            )  # fmt: skip
            self.observe(episode, 2 * number, read)
        self.observe(episode, 2 * len(turns), "garden", reward, terminated=True)
        played = [sequence.snapshot() for sequence in sequences.values()]
        for number, arrays in enumerate(played):
            self.insert(
                SEQUENCES, episode=episode, number=number, tokens=arrays.num_tokens,
                sampled=int((arrays.loss_mask > 0).sum()), token_ids=arrays.token_ids,
                logprobs=arrays.logprobs, versions=arrays.versions, loss_mask=arrays.loss_mask,
                temperatures=arrays.temperatures, turns=arrays.turns, role=arrays.role,
            )  # fmt: skip
        trained = outcome == "trained"
        self.end(
            episode, outcome, reason, played_at=BEGAN + 1, reward=reward, success=reward > 0,
            turns=len(turns), prompt_tokens=sum(arrays.num_tokens for arrays in played),
            generated_tokens=sum(int(np.sum(arrays.loss_mask > 0)) for arrays in played),
            role_rewards=role_rewards, version_min=version,
            version_max=version, trained_at_version=version if trained else None,
            stages_s={"generate": 0.5, "env": 0.25},
            turn_rewards=[0.0] * (len(turns) - 1) + [reward], turn_states=["x"] * len(turns),
        )  # fmt: skip

    def end(self, episode: int, outcome: str, reason: str = "", **values) -> None:
        change = {
            "episode": episode, "outcome": outcome, "reason": reason,
            "ended_at": BEGAN + 2 + episode / 100,
        }  # fmt: skip
        self.store.commit([Change("update", EPISODES, change | values)])

    def started(self, start: int, **trainer) -> None:
        """A start of the run, with these settings of the trainer."""
        self.insert(
            STARTS, start=start, at=BEGAN, version=0, source={}, flash="1",
            config={"trainer": TrainerConfig(**trainer).model_dump(mode="json")},
        )  # fmt: skip

    def batch(
        self,
        version: int,
        *parts: Sequence[int],
        start: int = 1,
        done: bool = True,
        sequences: Mapping[int, int] | None = None,
    ) -> None:
        """Its parts, as episodes of one group each, with so many `sequences` each, by default one;
        and its step, if it was done."""
        for number, episodes in enumerate(parts):
            self.insert(
                BATCHES, version=version, part=number, start=start, at=BEGAN,
                last=number == len(parts) - 1, metrics={},
            )  # fmt: skip
            played = [
                (episode, sequence)
                for episode in episodes
                for sequence in range((sequences or {}).get(episode, 1))
            ]
            for position, (episode, sequence) in enumerate(played):
                self.insert(
                    SAMPLES, version=version, part=number, position=position, episode=episode,
                    number=sequence, group=number, advantage=[9.0], reward=float(episode),
                )  # fmt: skip
        if done:
            self.step(version + 1, start=start)

    def step(self, number: int, *, start: int) -> None:
        metrics = {"loss": (number - 1) / 8}
        self.insert(STEPS, step=number, start=start, at=BEGAN, metrics=metrics)

    def forget_tokens(self, episode: int) -> None:
        self.store.commit([Change("delete", SEQUENCES, {"episode": episode})])
