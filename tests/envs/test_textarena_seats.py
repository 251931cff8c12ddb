"""Roles that play a game of TextArena: who sits where, what is trained, what it is worth."""

import itertools
import re

import pytest

pytest.importorskip("textarena", reason="needs the extra 'textarena'")

from examples.textarena_seats import act
from flash.agents.external import ExternalAgent
from flash.door import Door
from flash.fakes import FakeWorker
from flash.hub.hub import InferenceHub
from flash.roles import Role
from flash.rollout.episode import Episode
from flash.rollout.loop import RolloutLoop
from flash.types import Completion, Task
from tests.tools.templates import HERMES, tokenizer_of

pytestmark = pytest.mark.slow


async def test_a_policy_plays_against_an_untrained_role_in_every_seat_and_is_rewarded_for_its_own():
    """Both take the first cell that is free, so who begins has 2, 4 and 6 at last."""
    tokenizer = tokenizer_of(HERMES)

    def move(prompt, sampling=None):
        free = re.findall(r"'\[(\d)\]'", tokenizer.decode(list(prompt)).rpartition("Moves:")[2])
        return tokenizer.encode(f"[{free[0]}]<|im_end|>", add_special_tokens=False)

    async def earlier(token_ids, sampling):
        said = move(token_ids)
        return Completion(
            token_ids=said, logprobs=[-1.0] * len(said), versions=[0] * len(said),
            temperature=1.0, finish_reason="stop",
        )  # fmt: skip

    async with (
        InferenceHub([FakeWorker("w", token_s=(0, 0), script=move)]) as hub,
        Door(hub, tokenizer=tokenizer, model="policy") as door,
    ):
        agent = ExternalAgent(
            door=door,
            act=act,
            roles={"player": Role(), "rival": Role(generate=earlier)},
            max_tokens=8,
            max_sequence_tokens=8192,
            options={"id": "TicTacToe-v0"},
        )
        for seed, reward, turns in ((0, 1.0, 4), (1, -1.0, 3)):
            trajectory = await agent.play(Episode(seed, Task(seed), hub=hub))
            assert (trajectory.reward, trajectory.success) == (reward, reward > 0)
            assert trajectory.role_rewards == {"player": reward}
            (sequence,) = [s for s in trajectory.sequences if s.loss_mask.any()]
            assert sequence.role == "player"
            said = [tokenizer.decode(run) for is_sampled, run in sequence.runs(0) if is_sampled]
            assert said == [f"[{cell}]<|im_end|>" for cell in range(seed, 7, 2)][:turns]


async def test_a_policy_that_plays_both_seats_learns_of_each_what_it_was_worth():
    tokenizer = tokenizer_of(HERMES)
    check = tokenizer.encode("[check]<|im_end|>", add_special_tokens=False)
    worker = FakeWorker("w", token_s=(0, 0), script=lambda prompt, sampling: check)
    async with (
        InferenceHub([worker]) as hub,
        Door(hub, tokenizer=tokenizer, model="policy") as door,
        RolloutLoop(
            hub,
            agent=lambda: ExternalAgent(
                door=door, act=act, roles={"one": Role(), "other": Role()}, max_tokens=16,
                max_sequence_tokens=32_768, options={"id": "KuhnPoker-v0"},
            ),
            tasks=(Task(seed) for seed in itertools.count()),
            batch_size=4,
            group_size=2,
            alpha=1,
        ) as loop,
    ):  # fmt: skip
        batch = await loop.next_batch()
    rewards = {}
    for sample in batch.samples:
        rewards.setdefault(sample.episode, {})[sample.role] = sample.reward
    assert len(rewards) == 2 * 2
    for worth in rewards.values():
        assert sorted(worth) == ["one", "other"]
        assert worth["one"] == -worth["other"]
    assert any(worth["one"] for worth in rewards.values())
