"""A tokenizer that chats and calls tools, workers that say what a test wants, and a client."""

import contextlib
from collections.abc import AsyncIterator

import openai
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flash.door import Door
from flash.fakes import FakeWorker
from flash.hub.hub import InferenceHub
from flash.rollout.episode import Episode
from flash.types import SamplingParams, Task

# Close to what instruction-tuned models have: past reasoning is dropped, words are trimmed, calls
# are written anew.
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n"
    "{% for tool in tools %}{{ tool.function | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|im_end|>", "content": "text"},
    },
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and one for "go"."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "go"]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges=[("g", "o")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|call|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


class House:
    """A door over a hub of one fake worker, which says what is in `says`, then "ok"."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, constrains: bool) -> None:
        self.tokenizer = tokenizer
        self.says: list[str | list[int]] = []
        self.prompts: list[list[int]] = []
        self.samplings: list[SamplingParams] = []
        self.worker = FakeWorker(
            "worker", token_s=(0, 0), script=self._script, constrains=constrains
        )
        self.clients: list[openai.AsyncOpenAI] = []
        self.door: Door
        self.hub: InferenceHub

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, token_ids) -> str:
        return self.tokenizer.decode(list(token_ids))

    def open(self, **changes):
        """A session of a new episode, and a client of it."""
        options = {"max_tokens": 1000, "temperature": 1.0, "max_sequence_tokens": 10_000}
        episode = Episode(1, Task(1), hub=self.hub)
        session = self.door.open(episode.generate, **{**options, **changes})
        return session, self.client(session)

    def client(self, session) -> openai.AsyncOpenAI:
        client = openai.AsyncOpenAI(
            base_url=session.base_url, api_key=session.api_key, max_retries=0
        )
        self.clients.append(client)
        return client

    def _script(self, prompt, sampling):
        self.prompts.append(list(prompt))
        self.samplings.append(sampling)
        said = self.says.pop(0) if self.says else "ok<|im_end|>"
        return self.tokens(said) if isinstance(said, str) else said


@pytest.fixture
def enter(tokenizer):
    """Opens a house, whose worker may keep to constraints, with the given options of its door."""

    @contextlib.asynccontextmanager
    async def enter(*, constrains=False, **options) -> AsyncIterator[House]:
        house = House(tokenizer, constrains=constrains)
        async with (
            InferenceHub([house.worker]) as house.hub,
            Door(house.hub, tokenizer=tokenizer, model="policy", **options) as house.door,
        ):
            yield house
            for client in house.clients:
                await client.close()

    return enter
