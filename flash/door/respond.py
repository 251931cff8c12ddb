"""From a request to its responses, in whatever dialect: prompt, sampling, recording.

A dialect (`openai.py`, `anthropic.py`) reads a body into what is asked here, and tells what was
answered.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

from flash.conversation import ChatTemplate
from flash.door.constraint import SHOWN, Constraints
from flash.door.errors import LEAVE_OUT, ApiError, refused
from flash.door.metrics import Metrics
from flash.door.recorder import Known
from flash.door.reply import Delta, Manners, Reply, load_template, manners_of
from flash.door.schema import ChatAsk, TextAsk, as_template
from flash.door.session import DoorSession
from flash.types import Completion, SamplingParams

_PIECE_TOKENS = 16  # of a streamed response


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One response, sampled and recorded.

    `pieces` are its deltas, some at a time, each with the number of tokens so far.
    """

    index: int
    completion: Completion
    reply: Reply
    pieces: list[tuple[list[Delta], int]]
    finish_reason: str


class Responder:
    """Makes exchanges: what the door's requests have in common."""

    def __init__(self, tokenizer: Any, metrics: Metrics, manners: Manners) -> None:
        self.tokenizer = tokenizer
        self.metrics = metrics
        template = manners.response_template
        self.parses_tools = template is not None and "tool_calls" in template["fields"]
        self.response_templates = {
            tools: load_template(template, tools=tools) for tools in (False, True)
        }
        self.template: ChatTemplate | None = None
        self.shows_tools = False
        self.stop_token_ids = manners.stop_token_ids
        if getattr(tokenizer, "chat_template", None):
            self.template = ChatTemplate(tokenizer)
            self.shows_tools = _shows_tools(self.template)
            stops = (*self.template.stop_token_ids, *manners.stop_token_ids)
            self.stop_token_ids = tuple(dict.fromkeys(stops))
            self._constraints = Constraints(tokenizer, self.template, template, self.stop_token_ids)
        # An engine may know more tokens that end a turn than we do; they are special ones.
        self.ends = frozenset({*tokenizer.all_special_ids, *self.stop_token_ids})

    @classmethod
    async def create(cls, tokenizer: Any, metrics: Metrics) -> "Responder":
        """Reads what is known of the tokenizer's model."""
        return cls(tokenizer, metrics, await asyncio.to_thread(manners_of, tokenizer))

    def chat(self, session: DoorSession, ask: ChatAsk) -> "Exchange":
        """Raises ApiError for what this model can't do."""
        if self.template is None:
            raise ApiError(
                400, "the model has no chat template, so it can't chat: use /v1/completions"
            )
        if ask.tools and not self.shows_tools:
            raise ApiError(
                400, "tools: the model's chat template does not show them to it: leave them out",
                code="unsupported_value", param="tools",
            )  # fmt: skip
        if ask.parse_tools and not self.parses_tools:
            raise ApiError(
                400, "tools: how this model writes a call is not known: give its tokenizer a "
                'response_template, or send tool_choice="none"',
                code="unsupported_value", param="tools",
            )  # fmt: skip
        session.check_chars(sum(len(message["content"]) for message in ask.messages))
        taken = ask.template_variables.keys() & self.template.arguments
        if taken:
            raise ApiError(
                400, f"chat_template_kwargs={sorted(taken)}: these are for the door to say: leave "
                "them out", code="unsupported_value", param="chat_template_kwargs",
            )  # fmt: skip
        try:
            prompt = session.memory.chat_prompt(self.template, ask.messages, ask.shown)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error
        constraint = None
        if ask.demand is not None:
            constraint = self._constraints.of(ask.demand, prompt)
        return _Chat(self, session, ask, prompt, constraint)

    def text(self, session: DoorSession, ask: TextAsk) -> "Exchange":
        """Raises ApiError for a prompt that is none."""
        prompt = ask.prompt
        if isinstance(prompt, str):
            session.check_chars(len(prompt))
            prompt = session.memory.text_prompt(self.tokenizer, prompt)
        elif prompt and max(prompt) >= len(self.tokenizer):
            raise refused("prompt", max(prompt), f"there are {len(self.tokenizer)} tokens only")
        if not prompt:
            raise refused("prompt", ask.prompt, "it has no tokens: send at least one")
        return _Text(self, session, ask, prompt)


class Exchange(ABC):
    """One request being answered."""

    def __init__(
        self, responder: Responder, session: DoorSession, ask: ChatAsk | TextAsk, prompt: list[int]
    ) -> None:
        self.ask = ask
        self.prompt = prompt
        self.tokenizer = responder.tokenizer
        self._metrics = responder.metrics
        self._session = session
        self._ends = responder.ends
        self._stop_token_ids: Sequence[int] = ()
        self._constraint: str | None = None

    async def respond(self, index: int) -> Response:
        """Samples one response and records it."""
        session = self._session
        sampling = replace(
            session.sampling(self.ask, self.prompt, self._stop_token_ids),
            constraint=self._constraint,
        )
        clock = asyncio.get_running_loop().time
        started = clock()
        completion = await self._generate(sampling)
        self._metrics.generate_s.labels(completion.worker).observe(clock() - started)
        sampled = completion.token_ids
        ended = completion.finish_reason == "stop" and sampled[-1] in self._ends
        reply = self._new_reply(sampled[-1:] if ended else ())
        pieces = []
        size = _PIECE_TOKENS if self.ask.stream else len(sampled)
        for start in range(0, len(sampled), size):
            deltas = reply.feed(sampled[start : start + size])
            pieces.append((deltas, len(reply.token_ids)))
            if reply.stopped:
                break
        kept = len(reply.token_ids)
        pieces.append((reply.finish(), kept))
        completion = completion.cut(kept)
        if session.recorder is not None:
            trained = self._constraint is None
            self._note(reply, session.recorder.add(self.prompt, completion, trained=trained))
        finish_reason = "tool_calls" if reply.tool_calls else "stop"
        if completion.finish_reason == "length" and not reply.stopped:
            finish_reason = "length"
        return Response(
            index=index,
            completion=completion,
            reply=reply,
            pieces=pieces,
            finish_reason=finish_reason,
        )

    async def _generate(self, sampling: SamplingParams) -> Completion:
        return await self._session.generate(self.prompt, sampling)

    @abstractmethod
    def _new_reply(self, stop_token_ids: Sequence[int]) -> Reply: ...

    @abstractmethod
    def _note(self, reply: Reply, known: Known) -> None: ...


class _Chat(Exchange):
    ask: ChatAsk

    def __init__(
        self,
        responder: Responder,
        session: DoorSession,
        ask: ChatAsk,
        prompt: list[int],
        constraint: str | None,
    ) -> None:
        super().__init__(responder, session, ask, prompt)
        self._stop_token_ids = responder.stop_token_ids
        self._constraint = constraint
        self._template = responder.response_templates[ask.parse_tools]

    async def _generate(self, sampling: SamplingParams) -> Completion:
        try:
            return await super()._generate(sampling)
        except ApiError as error:
            if self.ask.demand is None or error.status != HTTPStatus.BAD_REQUEST:
                raise
            asked = self.ask.demand.asked
            raise refused(asked.field, asked.value, f"{error}: {LEAVE_OUT}") from error

    def _new_reply(self, stop_token_ids: Sequence[int]) -> Reply:
        return Reply(
            self.tokenizer,
            stop=self.ask.stop,
            stop_token_ids=stop_token_ids,
            response_template=self._template,
            prompt=self.prompt,
            tools=self.ask.tools,
        )

    def _note(self, reply: Reply, known: Known) -> None:
        said = as_template(reply.message())
        self._session.memory.note_chat(self.ask.messages, said, self.ask.shown, known)


class _Text(Exchange):
    ask: TextAsk

    def __init__(
        self, responder: Responder, session: DoorSession, ask: TextAsk, prompt: list[int]
    ) -> None:
        super().__init__(responder, session, ask, prompt)
        eos = responder.tokenizer.eos_token_id
        self._stop_token_ids = () if eos is None else (eos,)

    def _new_reply(self, stop_token_ids: Sequence[int]) -> Reply:
        return Reply(self.tokenizer, stop=self.ask.stop, stop_token_ids=stop_token_ids)

    def _note(self, reply: Reply, known: Known) -> None:
        if isinstance(self.ask.prompt, str):
            self._session.memory.note_text(self.ask.prompt + reply.content, known)


def _shows_tools(template: ChatTemplate) -> bool:
    messages = [{"role": "user", "content": "?"}]
    return template.render(messages) != template.render(messages, SHOWN)
