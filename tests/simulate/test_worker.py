"""The simulated worker, against times worked by hand and a worker that counts each token."""

import asyncio
import random
from pathlib import Path

import pytest

from flash import virtual_time
from flash.simulate.scenario import Scenario
from flash.simulate.worker import SimulatedWorker
from flash.simulate.world import World
from flash.types import SamplingParams, Task, Weights

ANY_LENGTH = SamplingParams(max_tokens=10**6)


class Lab:
    """One worker and requests of known lengths, under virtual time."""

    def __init__(self, *, grain: int = 1, **workers) -> None:
        self.scenario = Scenario(
            steps=1, grain=grain, workers={"kv_tokens": 10_000, **workers}, max_sequence_tokens=9000
        )
        self.world = World(self.scenario)
        self.worker = SimulatedWorker("w", self.scenario.workers, self.world)
        self.clock = asyncio.get_running_loop().time

    def script(self, *, task: int = 0, prompt: int, response: int | list[int]):
        script = self.world.begin(Task(task).seed)
        script.prompt_tokens = prompt
        script.response_tokens = response if isinstance(response, list) else [response]
        script.context = self.world.entries(prompt)
        return script

    async def ask(self, script, *, after_s: float = 0.0, extra: int = 0, max_tokens=ANY_LENGTH):
        """The completion, and when it came."""
        await asyncio.sleep(after_s)
        prompt = [script.number] * (script.context + extra)
        answer = await self.worker.generate(f"r{script.number}-{extra}", prompt, max_tokens)
        return answer, self.clock()


def run(main):
    return virtual_time.run(main())


def test_a_request_takes_its_prompt_and_a_step_a_token():
    async def main():
        lab = Lab(step_s=0.01, prefill_s=0.001)
        answer, ended = await lab.ask(lab.script(prompt=100, response=50))
        assert ended == pytest.approx(100 * 0.001 + 50 * 0.01)
        assert len(answer.token_ids) == len(answer.logprobs) == len(answer.versions) == 50
        assert answer.finish_reason == "stop"

    run(main)


def test_requests_share_steps_and_each_makes_them_longer():
    async def main():
        lab = Lab(step_s=0.01, request_s=0.002)
        scripts = [lab.script(task=i, prompt=1, response=n) for i, n in enumerate((10, 30))]
        (_, first), (_, second) = await asyncio.gather(*map(lab.ask, scripts))
        assert first == pytest.approx(10 * (0.01 + 2 * 0.002))
        assert second == pytest.approx(first + 20 * (0.01 + 0.002))

    run(main)


def test_a_prompt_holds_up_those_that_decode():
    async def main():
        lab = Lab(step_s=0.01, prefill_s=0.001)
        early, late = (lab.script(task=i, prompt=200, response=100) for i in range(2))
        (_, first), (_, second) = await asyncio.gather(lab.ask(early), lab.ask(late, after_s=0.5))
        assert first == pytest.approx(0.2 + 1.0 + 0.2)
        assert second == pytest.approx(0.5 + 0.2 + 1.0)

    run(main)


def count_each_token(jobs, *, step_s, request_s, context_s):
    """When each (arrival, prompt, response) ends, token by token, prompts for nothing."""
    now, running, ends = 0.0, [], {}
    waiting = sorted(range(len(jobs)), key=lambda i: jobs[i][0])
    while waiting or running:
        while waiting and (jobs[waiting[0]][0] <= now or not running):
            now = max(now, jobs[waiting[0]][0])
            running.append([waiting.pop(0), 0])
        context = sum(jobs[i][1] + done for i, done in running)
        now += step_s + len(running) * request_s + context * context_s
        for job in running:
            job[1] += 1
        ends |= {i: now for i, done in running if done == jobs[i][2]}
        running = [job for job in running if job[0] not in ends]
    return [ends[i] for i in range(len(jobs))]


@pytest.mark.parametrize("seed", range(5))
def test_jumping_from_event_to_event_agrees_with_counting_each_token(seed):
    rng = random.Random(seed)
    jobs = [(rng.uniform(0, 20), rng.randrange(1, 400), rng.randrange(100, 800)) for _ in range(20)]
    times = {"step_s": 0.01, "request_s": 0.001, "context_s": 2e-6}

    async def main():
        lab = Lab(**times, kv_tokens=10**6)
        scripts = [lab.script(task=i, prompt=p, response=r) for i, (_, p, r) in enumerate(jobs)]
        asked = [lab.ask(s, after_s=a) for s, (a, _, _) in zip(scripts, jobs, strict=True)]
        return [ended for _, ended in await asyncio.gather(*asked)]

    # A request joins in mid-step here, and at the next step there: a step takes 0.03 s.
    assert run(main) == pytest.approx(count_each_token(jobs, **times), abs=0.04)


def test_who_began_last_is_preempted_when_there_is_no_room_and_starts_anew():
    async def main():
        lab = Lab(step_s=0.01, prefill_s=0.001)
        first, last = (lab.script(task=i, prompt=4000, response=2000) for i in range(2))
        (_, first_ended), (answer, last_ended) = await asyncio.gather(lab.ask(first), lab.ask(last))
        assert lab.worker.preemptions == 1
        # Room for 1000 tokens more of each; then the first one goes on alone.
        assert first_ended == pytest.approx(8.0 + 10.0 + 10.0)
        assert last_ended == pytest.approx(first_ended + 5000 * 0.001 + 10.0)
        assert len(answer.token_ids) == 2000

    run(main)


def test_who_was_preempted_goes_before_those_that_came_later():
    async def main():
        lab = Lab(step_s=0.01)
        first, last = (lab.script(task=i, prompt=4000, response=2000) for i in range(2))
        third = lab.script(task=3, prompt=6000, response=100)
        asked = [lab.ask(first), lab.ask(last), lab.ask(third, after_s=1.0)]
        ends = [ended for _, ended in await asyncio.gather(*asked)]
        assert ends == pytest.approx([20.0, 30.0, 31.0])

    run(main)


def test_the_next_turn_finds_its_conversation_in_the_cache():
    async def main():
        lab = Lab(step_s=0.01, prefill_s=0.001)
        script = lab.script(prompt=1000, response=[100, 100])
        _, first = await lab.ask(script)
        script.turn, script.context = 1, 1000 + 100 + 50
        _, second = await lab.ask(script)
        assert second - first == pytest.approx(50 * 0.001 + 1.0)

    run(main)


def test_a_group_shares_its_prompt():
    async def main():
        lab = Lab(step_s=0.01, prefill_s=0.001)
        _, first = await lab.ask(lab.script(task=7, prompt=1000, response=100))
        _, second = await lab.ask(lab.script(task=7, prompt=1000, response=100))
        assert second - first == pytest.approx(1 * 0.001 + 1.0)  # its last token is always computed
        _, other = await lab.ask(lab.script(task=8, prompt=1000, response=100))
        assert other - second == pytest.approx(1000 * 0.001 + 1.0)

    run(main)


def test_the_cache_makes_room_for_what_runs_and_forgets_with_the_weights():
    async def main():
        lab = Lab(step_s=0.01, prefill_s=0.001)
        await lab.ask(lab.script(task=1, prompt=4000, response=100))
        await lab.ask(lab.script(task=2, prompt=8000, response=100))
        began = lab.clock()
        _, ended = await lab.ask(lab.script(task=1, prompt=4000, response=100))
        assert ended - began == pytest.approx(5.0), "what was used longest ago went"
        await lab.worker.load_weights(Weights(version=1, path=Path()))
        began = lab.clock()
        _, ended = await lab.ask(lab.script(task=1, prompt=4000, response=100))
        assert ended - began == pytest.approx(5.0)

    run(main)


async def publish(lab, mode, *, load_s):
    await lab.worker.pause(mode)
    await asyncio.sleep(load_s)
    await lab.worker.set_version(1)
    await lab.worker.resume()


def test_keep_freezes_what_runs_and_its_later_tokens_have_the_new_version():
    async def main():
        lab = Lab(step_s=0.01)
        asked = asyncio.create_task(lab.ask(lab.script(prompt=10, response=100)))
        await asyncio.sleep(0.4)
        await publish(lab, "keep", load_s=5.0)
        answer, ended = await asked
        assert ended == pytest.approx(6.0)
        assert answer.versions == [0] * 40 + [1] * 60

    run(main)


def test_a_publish_in_the_middle_of_a_prompt_does_not_shorten_it():
    async def main():
        lab = Lab(step_s=0.01, prefill_s=0.01)
        asked = asyncio.create_task(lab.ask(lab.script(prompt=100, response=10)))
        await asyncio.sleep(0.4)
        await publish(lab, "keep", load_s=5.0)
        answer, ended = await asked
        assert ended == pytest.approx(5.0 + 1.0 + 0.1)
        assert set(answer.versions) == {1}

    run(main)


def test_abort_answers_what_is_there_and_the_rest_can_be_asked_for():
    async def main():
        lab = Lab(step_s=0.01, grain=16)
        script = lab.script(prompt=16, response=100)
        asked = asyncio.create_task(lab.ask(script))
        await asyncio.sleep(0.4)
        await publish(lab, "abort", load_s=5.0)
        answer, ended = await asked
        assert ended == pytest.approx(0.4)
        assert answer.finish_reason == "abort"
        assert len(answer.token_ids) == 2, "the third entry had 8 of its 16 tokens"
        began = lab.clock()
        rest, ended = await lab.ask(script, extra=2)
        assert ended - began == pytest.approx(0.68)
        assert rest.versions == [1] * 5

    run(main)


def test_wait_lets_all_end_first():
    async def main():
        lab = Lab(step_s=0.01)
        asked = asyncio.create_task(lab.ask(lab.script(prompt=10, response=100)))
        await asyncio.sleep(0.4)
        await publish(lab, "wait", load_s=5.0)
        answer, ended = await asked
        assert ended == pytest.approx(1.0)
        assert set(answer.versions) == {0}
        assert lab.clock() == pytest.approx(6.0)

    run(main)


@pytest.mark.parametrize("after_s", [0.05, 0.4])
def test_a_request_that_is_cancelled_leaves_its_place(after_s):
    async def main():
        lab = Lab(step_s=0.01, request_s=0.01, prefill_s=0.001)
        gone = asyncio.create_task(lab.ask(lab.script(task=1, prompt=100, response=500)))
        await asyncio.sleep(after_s)
        gone.cancel()
        await asyncio.wait([gone])
        began = lab.clock()
        _, ended = await lab.ask(lab.script(task=2, prompt=100, response=100))
        assert ended - began == pytest.approx(0.1 + 100 * 0.02)

    run(main)


def test_a_response_is_cut_at_max_tokens():
    async def main():
        lab = Lab(step_s=0.01)
        script = lab.script(prompt=10, response=100)
        answer, ended = await lab.ask(script, max_tokens=SamplingParams(max_tokens=30))
        assert (answer.finish_reason, len(answer.token_ids)) == ("length", 30)
        assert ended == pytest.approx(0.3)

    run(main)
