"""What one token opens: an episode's calls, what they sampled, and their limits."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from flash.conversation import longest_text
from flash.door.errors import LEAVE_OUT, ApiError, refused
from flash.door.limits import Allowance
from flash.door.recorder import Memory, Recorder
from flash.door.schema import Ask
from flash.errors import FlashError
from flash.types import Completion, Generate, SampledSequence, SamplingParams


class Session:
    """What one token opens, until it is closed."""

    def __init__(
        self,
        *,
        door_url: str,
        api_key: str,
        allowance: Allowance,
        on_close: Callable[["Session"], None],
    ) -> None:
        self.api_key = api_key
        self.base_url = f"{door_url}/episodes/{api_key}/v1"
        self.anthropic_base_url = anthropic_base_url(self.base_url)
        self.allowance = allowance
        self._on_close = on_close
        self._closed = False
        self._calls: set[asyncio.Timeout] = set()

    def close(self) -> None:
        """Ends it: calls under way are cancelled, later ones answered 401."""
        self._closed = True
        for call in self._calls:
            call.reschedule(asyncio.get_running_loop().time())
        self._on_close(self)

    @contextlib.asynccontextmanager
    async def calling(self) -> AsyncIterator[None]:
        """A call, in the block; ApiError once the session is closed."""
        if self._closed:
            raise _ended()
        try:
            async with asyncio.timeout(None) as call:
                self._calls.add(call)
                try:
                    yield
                finally:
                    self._calls.discard(call)
        except TimeoutError as error:
            if not call.expired():
                raise
            raise _ended() from error


class DoorSession(Session):
    """One episode's way through the door, or that of a role in it; `Door.open` makes it."""

    def __init__(
        self,
        generate: Generate,
        *,
        max_tokens: int,
        temperature: float | None,
        max_sequence_tokens: int,
        role: str = "",
        turns: Iterator[int] | None = None,
        **of_any: Any,
    ) -> None:
        super().__init__(**of_any)
        # Without a temperature of its own it serves clients that train nothing: nothing is kept.
        self.recorder = None if temperature is None else Recorder(role=role, turns=turns)
        self.memory = Memory()
        self.kept: dict[
            str, Any
        ] = {}  # answers that may be gone on from, as their dialect has them
        self._generate = generate
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._max_sequence_tokens = max_sequence_tokens

    def sequences(self) -> list[SampledSequence]:
        """What was sampled so far, joined."""
        return self.recorder.sequences() if self.recorder is not None else []

    def check_chars(self, chars: int) -> None:
        """ApiError for a prompt that is so long that it is not tokenised."""
        if chars > longest_text(self._max_sequence_tokens):
            raise self._no_room(f"{chars} characters")

    def sampling(
        self, ask: Ask, prompt: Sequence[int], stop_token_ids: Sequence[int]
    ) -> SamplingParams:
        """How these responses are sampled; ApiError if they can't be as the client wants it."""
        room = self.check_room(len(prompt))
        temperature = 1.0 if self._temperature is None else self._temperature
        if ask.temperature is not None:
            if self._temperature is not None and ask.temperature != self._temperature:
                raise refused(
                    "temperature", ask.temperature,
                    f"this episode samples at {self._temperature:g}, which its training counts "
                    f"on: {LEAVE_OUT}",
                )  # fmt: skip
            temperature = ask.temperature
        return SamplingParams(
            max_tokens=min(ask.max_tokens or self._max_tokens, self._max_tokens, room),
            temperature=temperature,
            stop_token_ids=tuple(stop_token_ids),
            stop=ask.stop,
        )

    def check_room(self, prompt_tokens: int) -> int:
        """How many tokens an answer may have; ApiError if there are none."""
        room = self._max_sequence_tokens - prompt_tokens
        if room < 1:
            raise self._no_room(f"at least {prompt_tokens} tokens")
        return room

    async def generate(self, prompt: Sequence[int], sampling: SamplingParams) -> Completion:
        """One response; ApiError if there is none."""
        try:
            async with self.calling():
                return await self._generate(prompt, sampling)
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        except FlashError as error:
            raise ApiError(503, "the inference workers could not answer") from error

    def _no_room(self, length: str) -> ApiError:
        return ApiError(
            400,
            # By OpenAI's own first words clients know that a conversation is too long.
            f"This model's maximum context length is {self._max_sequence_tokens} tokens "
            f"(max_sequence_tokens={self._max_sequence_tokens}), and the prompt has {length}: send "
            f"a shorter one, which leaves room to answer",
            code="context_length_exceeded",
        )


def anthropic_base_url(base_url: str) -> str:
    """Its clients add what OpenAI's have in theirs."""
    return base_url.removesuffix("/v1")


def _ended() -> ApiError:
    return ApiError(401, "the episode of this token has ended", code="invalid_api_key")
