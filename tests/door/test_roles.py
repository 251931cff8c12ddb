"""Several who play one episode: whose tokens are whose, what each is worth, who is not trained."""

import itertools
from collections import defaultdict
from contextlib import asynccontextmanager

import httpx
import numpy as np
import openai
import pytest
from aiohttp import web

from flash.agents.external import ExternalAgent
from flash.door import Door
from flash.fakes import FakeWorker, KeepingObserver
from flash.hub.hub import InferenceHub
from flash.reward.stage import FunctionScorer, RewardStage
from flash.roles import Elsewhere, Role
from flash.rollout.filters import equal_rewards
from flash.rollout.loop import RolloutLoop
from flash.types import Completion, SampledSequence, Task, Trajectory, by_role


async def say(access, *messages):
    async with openai.AsyncOpenAI(**access, max_retries=0) as client:
        talk = [{"role": "user", "content": message} for message in messages]
        answer = await client.chat.completions.create(model="policy", messages=talk)
    return answer.choices[0].message


@asynccontextmanager
async def rollouts(tokenizer, act, roles, *, stage=None, records=None):
    """Batches of 4 samples in groups of 2 episodes; `act(roles, task)` is the agent."""

    async def life(*, roles, task):
        return await act(roles, task)

    go = tokenizer.encode("go<|im_end|>")
    worker = FakeWorker("w", token_s=(0, 0), script=lambda prompt, sampling: go)
    async with (
        InferenceHub([worker]) as hub,
        Door(hub, tokenizer=tokenizer, model="policy") as door,
        RolloutLoop(
            hub,
            agent=lambda: ExternalAgent(
                door=door, act=life, roles=roles, max_tokens=8, reward_stage=stage
            ),
            tasks=(Task(seed) for seed in itertools.count()),
            batch_size=4,
            group_size=2,
            alpha=1,
            observers=[KeepingObserver([] if records is None else records)],
        ) as loop,
    ):
        yield loop


def by_episode(samples):
    found = {}
    for sample in samples:
        found.setdefault(sample.episode, {})[sample.role] = sample
    return found


async def test_who_has_the_same_role_is_compared_with_each_other(tokenizer):
    played = defaultdict(itertools.count)

    async def act(roles, task):
        for role in ("planner", "coder"):
            await say(roles[role], f"{role} {task.seed}")
        return {"reward": 1.0, "rewards": {"coder": 10 * task.seed + next(played[task.seed])}}

    roles = {"planner": Role(), "coder": Role()}
    async with rollouts(tokenizer, act, roles) as loop:
        batch = await loop.next_batch()
    episodes = by_episode(batch.samples)
    assert len(episodes) == 4
    assert all(sorted(each) == ["coder", "planner"] for each in episodes.values())
    assert {each["planner"].reward for each in episodes.values()} == {1.0}
    assert {each["planner"].advantage for each in episodes.values()} == {0.0}
    coders = sorted((each["coder"] for each in episodes.values()), key=lambda coder: coder.reward)
    first, _, second, _ = (coder.reward for coder in coders)
    assert [coder.reward for coder in coders] == [first, first + 1, second, second + 1]
    assert [coder.advantage for coder in coders] == pytest.approx([-1, 1, -1, 1])
    for each in episodes.values():
        assert set(each["planner"].turns) == {-1, 0}
        assert set(each["coder"].turns) == {-1, 1}, "the second response of the episode"


async def test_a_share_is_of_the_reward_that_a_stage_gave_in_the_end(tokenizer):
    async def act(roles, task):
        for role in roles:
            await say(roles[role], "go")
        return {"reward": 1.0, "rewards": {"told": 7}}

    async def four(transcript):
        return 4.0

    roles = {"whole": Role(), "against": Role(share=-0.5), "told": Role(share=0.1)}
    stage = RewardStage(FunctionScorer(four), decode=tokenizer.decode)
    async with rollouts(tokenizer, act, roles, stage=stage) as loop:
        batch = await loop.next_batch()
    for each in by_episode(batch.samples).values():
        rewards = {role: sample.reward for role, sample in each.items()}
        assert rewards == {"whole": 4.0, "against": -2.0, "told": 7.0}


async def test_what_an_untrained_role_says_is_no_sample_and_keeps_no_episode_fresh(tokenizer):
    async def act(roles, task):
        await say(roles["critic"], "a look first")
        answer = await say(roles["coder"], "go")
        return len(answer.content)

    asked = []

    async def critic(token_ids, sampling):
        asked.append(sampling)
        return Completion(
            token_ids=tokenizer.encode("no<|im_end|>"), logprobs=[0.0] * 3, versions=[-9] * 3,
            temperature=1.0, finish_reason="stop", worker="frozen",
        )  # fmt: skip

    roles = {"coder": Role(), "critic": Role(generate=critic)}
    async with rollouts(tokenizer, act, roles) as loop:
        batch = await loop.next_batch()
    assert asked
    assert {sample.role for sample in batch.samples} == {"coder"}
    assert batch.metrics["staleness/max"] == 0


async def test_another_model_plays_a_role_where_it_is(tokenizer):
    seen = []

    async def chat(request):
        body = await request.json()
        seen.append((request.path, request.headers["Authorization"], body["model"]))
        if body["messages"][0]["content"] == "wrong":
            return web.json_response({"error": {"message": "no"}}, status=418)
        choice = {"index": 0, "finish_reason": "stop",
                  "message": {"role": "assistant", "content": "frozen"}}  # fmt: skip
        return web.json_response(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [choice],
            }
        )

    async def act(roles, task):
        assert (await say(roles["critic"], "go")).content == "frozen"
        with pytest.raises(openai.APIStatusError) as refused:
            await say(roles["critic"], "wrong")
        assert refused.value.status_code == 418
        await say(roles["coder"], "go")
        return 1.0

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    there = Elsewhere(url=f"http://127.0.0.1:{port}/v1", model="big", api_key="sesame")
    try:
        async with rollouts(
            tokenizer, act, {"coder": Role(), "critic": Role(elsewhere=there)}
        ) as loop:
            batch = await loop.next_batch()
    finally:
        await runner.cleanup()
    assert {sample.role for sample in batch.samples} == {"coder"}
    assert set(seen) == {("/v1/chat/completions", "Bearer sesame", "big")}


@pytest.mark.parametrize("name", ["..%2F..%2Fadmin", "a%2Fv1%2F..", "%2e%2e", "x%3Fy"])
async def test_no_path_leads_a_role_beside_the_model_that_it_is_passed_on_to(tokenizer, name):
    there = Elsewhere(url="http://127.0.0.1:9/v1", model="big", api_key="sesame")
    statuses = []

    async def act(roles, task):
        async with httpx.AsyncClient() as http:
            url = f"{roles['critic']['base_url']}/responses/{name}"
            statuses.append((await http.get(url)).status_code)
        await say(roles["coder"], "go")
        return 1.0

    roles = {"coder": Role(), "critic": Role(elsewhere=there)}
    async with rollouts(tokenizer, act, roles) as loop:
        await loop.next_batch()
    assert {*statuses} <= {404, 405}, "it was not asked, or it would not have answered: 502"


async def test_a_model_that_is_not_there_is_told_of_by_its_url(tokenizer):
    gone = Elsewhere(url="http://127.0.0.1:9/v1", model="big")
    told = []

    async def act(roles, task):
        with pytest.raises(openai.APIStatusError) as refused:
            await say(roles["critic"], "go")
        told.append(refused.value)
        await say(roles["coder"], "go")
        return 1.0

    async with rollouts(tokenizer, act, {"coder": Role(), "critic": Role(elsewhere=gone)}) as loop:
        await loop.next_batch()
    assert told[0].status_code == 502
    assert "http://127.0.0.1:9/v1/chat/completions did not answer" in str(told[0])


@pytest.mark.parametrize(
    "rewards",
    [
        {"critic": "much"},
        {"nobody": 1.0},
        {"coder": float("nan")},
        {"coder": "much"},
        5,
        ["coder"],
    ],
)
async def test_rewards_of_roles_are_finite_numbers_of_those_who_play(tokenizer, rewards):
    async def act(roles, task):
        await say(roles["coder"], "go")
        return {"reward": 1.0, "rewards": rewards if task.seed == 0 else {"coder": 2.0}}

    async def nobody(token_ids, sampling):
        raise AssertionError

    records = []
    roles = {"coder": Role(), "critic": Role(generate=nobody)}
    async with rollouts(tokenizer, act, roles, records=records) as loop:
        await loop.next_batch()
    failed = [record for record in records if record.reason == "reward"]
    assert failed
    assert {record.seed for record in failed} == {0}


async def test_a_role_that_is_silent_in_an_episode_counts_for_the_others(tokenizer):
    calls = itertools.count()

    async def act(roles, task):
        await say(roles["planner"], "go")
        number = next(calls)
        if number % 2:
            await say(roles["coder"], "go")
        return float(number)

    roles = {"planner": Role(), "coder": Role()}
    async with rollouts(tokenizer, act, roles) as loop:
        batch = await loop.next_batch()
    coders = [sample for sample in batch.samples if sample.role == "coder"]
    assert 1 <= len(coders) <= 3
    for sample in coders:
        planner = by_episode(batch.samples)[sample.episode]["planner"]
        assert sample.advantage == planner.advantage, "against the same episodes of the group"


def test_the_episodes_of_one_player_are_as_they_are():
    group = [Trajectory(sequences=[], reward=1.0, turns=0)]
    assert by_role(group) == {"": group}


def test_a_group_is_dropped_only_if_no_role_learns_of_it():
    def episode(**rewards):
        one = np.zeros(1)
        return Trajectory(
            sequences=[
                SampledSequence(
                    token_ids=one, loss_mask=one, logprobs=one, versions=one, temperatures=one,
                    turns=one, role=role,
                )
                for role in rewards
            ],
            reward=1.0, turns=1, role_rewards=rewards,
        )  # fmt: skip

    assert equal_rewards([episode(a=1.0, b=2.0), episode(a=1.0, b=2.0)])
    assert not equal_rewards([episode(a=1.0, b=2.0), episode(a=1.0, b=3.0)])
