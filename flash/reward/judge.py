"""A language model that says what an episode was worth: the policy itself, or one at a URL."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

from flash.conversation import ChatTemplate
from flash.errors import RewardFailure
from flash.reward.prompt import PROMPT, check_prompt
from flash.rollout.episode import Generator
from flash.types import GenerateRequest, SamplingParams, Transcript

Ask = Callable[[str], Awaitable[str]]

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_ERROR_CHARACTERS = 300


class Judge:
    """A scorer that asks a model for a grade, and takes the last number in its answer.

    The reward is the grade divided by `max_score`. An answer without a number, or with one below 0
    or above `max_score`, gives no reward.

    Args:
        ask: from a prompt to an answer: `ask_hub`, `ask_url`, or your own.
        prompt: a format string; it may have {text}, {response} (the last one), {seed}, {options},
            {reward} (the environment's) and {max_score}.
    """

    def __init__(self, ask: Ask, *, prompt: str = PROMPT, max_score: float = 10.0) -> None:
        self._ask = ask
        self._prompt = prompt
        self._max_score = max_score
        check_prompt(prompt)

    async def __call__(self, transcript: Transcript, *, timeout_s: float) -> float:
        prompt = self._prompt.format(
            text=transcript.text,
            response=transcript.responses[-1] if transcript.responses else "",
            seed=transcript.task.seed,
            options=dict(transcript.task.options),
            reward=transcript.reward,
            max_score=self._max_score,
        )
        async with asyncio.timeout(timeout_s):
            answer = await self._ask(prompt)
        numbers = _NUMBER.findall(answer)
        if not numbers:
            raise RewardFailure(f"no number: the judge said {answer!r}")
        grade = float(numbers[-1])
        if not 0 <= grade <= self._max_score:
            raise RewardFailure(
                f"no grade from 0 to {self._max_score:g}: the judge said {answer!r}"
            )
        return grade / self._max_score


def ask_hub(hub: Generator, tokenizer: Any, *, max_tokens: int, temperature: float = 1.0) -> Ask:
    """Asks the policy itself, as it is then, through the hub; its tokens train nothing."""
    template = ChatTemplate(tokenizer)
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, stop_token_ids=template.stop_token_ids
    )

    async def ask(prompt: str) -> str:
        token_ids = template.prompt([{"role": "user", "content": prompt}])
        completion = await hub.generate(GenerateRequest(token_ids=token_ids, sampling=sampling))
        text: str = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        return text

    return ask


def ask_url(
    session: aiohttp.ClientSession, url: str, *, model: str, api_key: str = "", max_tokens: int
) -> Ask:
    """Asks a model behind OpenAI's protocol, `url` as in https://host/v1."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    path = f"{url.rstrip('/')}/chat/completions"

    async def ask(prompt: str) -> str:
        body = {
            "model": model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "messages": [{"role": "user", "content": prompt}],
        }
        try:
            # The deadline is the scorer's.
            async with session.post(
                path, json=body, headers=headers, timeout=aiohttp.ClientTimeout(total=None)
            ) as response:
                if response.status != 200:
                    said = (await response.text())[:_ERROR_CHARACTERS]
                    raise RewardFailure(f"got status {response.status} from {path}: {said}")
                answer = await response.json()
        except aiohttp.ClientError as error:
            raise RewardFailure(f"got no answer from {path}: {error!r}") from error
        try:
            return str(answer["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError) as error:
            said = str(answer)[:_ERROR_CHARACTERS]
            raise RewardFailure(f"got no chat completion from {path}: {said}") from error

    return ask
