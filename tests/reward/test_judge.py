"""A model as the judge: through the hub, and at a URL."""

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from flash import virtual_time
from flash.errors import RewardFailure
from flash.fakes import FakeWorker
from flash.hub.hub import InferenceHub
from flash.reward.judge import Judge, ask_hub, ask_url
from flash.types import Task, Transcript

TRANSCRIPT = Transcript(
    task=Task(7, {"goal": "soap"}), text="all of it", responses=("one", "two"), reward=0.5,
    success=False,
)  # fmt: skip


def grade(answer, **options):
    """What a judge makes of an answer, and the prompt that it asked with."""
    prompts = []

    async def ask(prompt):
        prompts.append(prompt)
        return answer

    async def main():
        return await Judge(ask, **options)(TRANSCRIPT, timeout_s=1.0)

    return virtual_time.run(main()), prompts[0]


def test_the_last_number_is_the_grade_and_the_best_grade_is_1():
    assert grade("8")[0] == 0.8
    assert grade("Between 2 and 9, say: 7.5")[0] == 0.75
    assert grade("2", max_score=4)[0] == 0.5


def test_the_prompt_shows_what_it_is_asked_to():
    assert "all of it" in grade("1")[1]
    prompt = "{response}|{seed}|{options[goal]}|{reward}|{max_score}"
    assert grade("1", prompt=prompt)[1] == "two|7|soap|0.5|10.0"


@pytest.mark.parametrize("answer", ["", "very good", "11", "-1"])
def test_an_answer_without_a_grade_is_a_failure_and_not_0(answer):
    with pytest.raises(RewardFailure, match="the judge said"):
        grade(answer)


def test_a_prompt_that_can_not_be_filled_is_refused():
    for prompt in ("{texts}", "{text[0]}", "{text.words} ", "{seed[0]} {text}", "{} {text}"):
        with pytest.raises(ValueError, match="in the prompt: it may have .text."):
            Judge(None, prompt=prompt)
    with pytest.raises(ValueError, match="shows the judge nothing"):
        Judge(None, prompt="How was it?")


class Letters:
    """A tokenizer with a chat template: a token for each character."""

    chat_template = "…"
    eos_token_id = 1
    all_special_ids = (1,)
    added_tokens_decoder = {}  # noqa: RUF012  (nobody changes it)

    def apply_chat_template(self, messages, **_):
        return "".join(message["content"] for message in messages) + ":"

    def encode(self, text, **_):
        return [ord(letter) for letter in text]

    def decode(self, token_ids, **_):
        return "".join(map(chr, token_ids))


def test_the_policy_itself_judges_through_the_hub():
    asked = []

    def script(prompt, sampling):
        asked.append(("".join(map(chr, prompt)), sampling.max_tokens))
        return [ord("9")]

    async def main():
        async with InferenceHub([FakeWorker("w", script=script)]) as hub:
            ask = ask_hub(hub, Letters(), max_tokens=5)
            return await Judge(ask, prompt="Grade: {text}")(TRANSCRIPT, timeout_s=10.0)

    assert virtual_time.run(main()) == 0.9
    assert asked == [("Grade: all of it:", 5)]


async def test_a_model_at_a_url_judges_and_its_failures_are_told():
    requests, answers = [], []

    async def complete(request):
        requests.append((await request.json(), request.headers.get("Authorization")))
        status, body = answers.pop(0)
        return web.json_response(body, status=status)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    async with TestServer(app) as server, ClientSession() as session:
        url = str(server.make_url("/v1"))
        judge = Judge(ask_url(session, url, model="big", api_key="key", max_tokens=9))
        answers.append((200, {"choices": [{"message": {"content": "It gets a 6."}}]}))
        assert await judge(TRANSCRIPT, timeout_s=60.0) == 0.6
        asked, key = requests[0]
        assert (asked["model"], asked["max_tokens"], key) == ("big", 9, "Bearer key")
        answers += [(429, {"error": "too many"}), (200, {"error": "none"})]
        with pytest.raises(RewardFailure, match="status 429 from .*too many"):
            await judge(TRANSCRIPT, timeout_s=60.0)
        with pytest.raises(RewardFailure, match="no chat completion"):
            await judge(TRANSCRIPT, timeout_s=60.0)
    async with ClientSession() as session:
        judge = Judge(ask_url(session, url, model="big", max_tokens=9))
        with pytest.raises(RewardFailure, match="no answer from"):
            await judge(TRANSCRIPT, timeout_s=60.0)
