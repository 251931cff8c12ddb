"""Conversations token by token: what was sampled stays as it was sampled.

`TokenSequence` grows into what a trajectory holds. `ChatTemplate` makes prompts of messages in the
model's own chat template; of each later turn it tokenises only what the template puts after the
assistant's words.
"""

import contextlib
import inspect
import secrets
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from struct import pack
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from flash.types import UNKNOWN_EXPERT, Completion, Experts, SampledSequence

Message = Mapping[str, Any]
_Number = TypeVar("_Number", np.float32, np.int64)
NOTHING: Mapping[str, Any] = MappingProxyType({})
# Any words of theirs.
USER: Message = {"role": "user", "content": "?"}
SAID: Message = {"role": "assistant", "content": "!"}

# What is longer is not tokenised, which takes 1 s for a million: of texts that are worth reading a
# token has fewer than 10 characters, and few models read a million tokens.
CHARS_A_TOKEN, MAX_CHARS = 32, 4_000_000


def longest_text(max_sequence_tokens: int) -> int:
    """The most characters that are tokenised where so many tokens have room."""
    return min(CHARS_A_TOKEN * max_sequence_tokens, MAX_CHARS)


# What an array has for a token that was read: float32 and int64, as they lie in memory.
_ZERO, _ONE, _NONE = pack("=f", 0.0), pack("=f", 1.0), pack("=q", -1)


@dataclass(slots=True)
class _Sampled:
    """Where the tokens of a completion lie, and what the engine said of them.

    `logprobs` and `versions` are float32 and int64, as they lie in memory.
    """

    start: int
    end: int
    logprobs: bytes
    versions: bytes
    temperature: float
    turn: int
    trained: bool


class TokenSequence:
    """Tokens in the order they were seen or sampled, with what the engine said of each."""

    def __init__(self, prompt: Sequence[int], *, role: str = "") -> None:
        self.token_ids: list[int] = []
        self._role = role
        self._sampled: list[_Sampled] = []
        self._experts: list[Experts] = []  # of the first tokens, without gaps
        self._turn = 0
        self.add_prompt(prompt)

    @property
    def experts_from(self) -> int:
        """The first token whose experts no completion has told yet."""
        return sum(map(len, self._experts))

    def going_on(self) -> "TokenSequence":
        """Another, with all that there is of this one as its prompt."""
        other = TokenSequence(self.token_ids, role=self._role)
        other._experts += self._experts
        return other

    def add_prompt(self, token_ids: Sequence[int]) -> None:
        self.token_ids += token_ids

    def add_sampled(
        self, completion: Completion, *, turn: int | None = None, trained: bool = True
    ) -> None:
        """`turn` is which response of the episode it is; without it the next one. What was sampled
        under a constraint is not `trained`."""
        turn = self._turn if turn is None else turn
        self._turn = turn + 1
        tokens = len(completion.token_ids)
        if tokens == 0:
            return
        start = len(self.token_ids)
        self.token_ids += completion.token_ids
        if completion.experts is not None:
            self._add_experts(completion.experts)
        logprobs = pack(f"={tokens}f", *completion.logprobs)
        version = completion.only_version
        versions = (
            pack("=q", version) * tokens
            if version is not None
            else pack(f"={tokens}q", *completion.versions)
        )
        end, temperature = start + tokens, completion.temperature
        self._sampled.append(_Sampled(start, end, logprobs, versions, temperature, turn, trained))

    def _add_experts(self, experts: Experts) -> None:
        """Of tokens up to the last but one: what was known before stays, as it was sampled with."""
        first, known = len(self.token_ids) - 1 - len(experts), self.experts_from
        if first > known:
            self._experts.append(_unknown_experts(first - known, experts))
        self._experts.append(experts[max(0, known - first) :])

    def snapshot(self) -> SampledSequence:
        """As arrays, up to the last sampled token: what was read after it trains nothing.

        Bytes are joined, which takes half the time of arrays that are filled part by part.
        """
        loss_mask: list[bytes] = []
        logprobs: list[bytes] = []
        versions: list[bytes] = []
        temperatures: list[bytes] = []
        turns: list[bytes] = []
        end = 0
        for sampled in self._sampled:
            read, tokens = sampled.start - end, sampled.end - sampled.start
            end = sampled.end
            loss_mask += _ZERO * read, (_ONE if sampled.trained else _ZERO) * tokens
            logprobs += _ZERO * read, sampled.logprobs
            versions += _NONE * read, sampled.versions
            temperatures += _ONE * read, pack("=f", sampled.temperature) * tokens
            turns += _NONE * read, pack("=q", sampled.turn) * tokens
        return SampledSequence(
            token_ids=_array([pack(f"={end}q", *self.token_ids[:end])], np.int64),
            loss_mask=_array(loss_mask, np.float32),
            logprobs=_array(logprobs, np.float32),
            versions=_array(versions, np.int64),
            temperatures=_array(temperatures, np.float32),
            turns=_array(turns, np.int64),
            experts=self._experts_of(end),
            role=self._role,
        )

    def _experts_of(self, end: int) -> Experts | None:
        """Of so many tokens; None if no completion told any."""
        if not self._experts:
            return None
        unknown = _unknown_experts(end, self._experts[0])  # of the last tokens nobody told them
        experts: Experts = np.concatenate([*self._experts, unknown])[:end]
        return experts


def _unknown_experts(tokens: int, like: Experts) -> Experts:
    return np.full((tokens, *like.shape[1:]), UNKNOWN_EXPERT, np.int16)


def _array(parts: Iterable[bytes], dtype: type[_Number]) -> NDArray[_Number]:
    return np.frombuffer(bytearray().join(parts), dtype)  # of a bytearray, so that it is writable


@dataclass(frozen=True, slots=True, kw_only=True)
class SpokenTurn:
    """One response of a policy, and what it read since the one before; the last three lists have
    one length. `role` is who said it, of an episode that several play."""

    read: list[int]
    said: list[int]
    logprobs: list[float]
    versions: list[int]
    role: str = ""


def spoken_turns(sequences: Sequence[SampledSequence]) -> list[SpokenTurn]:
    """The responses of an episode, in their order.

    A sequence that begins with all of the one before it goes on from there: a sample of a later
    turn has the turns before it as its prompt.
    """
    turns: list[tuple[int, SpokenTurn]] = []
    known: list[int] = []
    for sequence in sequences:
        token_ids = sequence.token_ids.tolist()
        end = len(known) if token_ids[: len(known)] == known else 0
        read: list[int] = []
        for sampled, run in sequence.runs(end):
            start, end = end, end + len(run)
            if not sampled:
                read = run
                continue
            spoken = SpokenTurn(
                read=read,
                said=run,
                logprobs=sequence.logprobs[start:end].tolist(),
                versions=sequence.versions[start:end].tolist(),
                role=sequence.role,
            )
            turns.append((int(sequence.turns[start]), spoken))
        known = token_ids
    return [spoken for _, spoken in sorted(turns, key=lambda numbered: numbered[0])]


class ChatTemplate:
    """A tokenizer's chat template.

    Messages are as Hugging Face templates take them: `role`, `content`, and for tools
    `tool_calls` with their arguments as a mapping. A template that shows texts only as parts
    (`{"type": "text", …}`) is given those. `stop_token_ids` end an assistant's turn: those that
    the template puts there, the tokenizer's end of sequence, and those of generation_config.
    Raises ValueError for a tokenizer without a template, and for messages that it refuses.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: use "
                f"agent.style=plain, or an instruction-tuned model"
            )
        self._tokenizer = tokenizer
        # Stands where the assistant's words stood; nobody else can write it.
        self._sentinel = f"sampled-{secrets.token_hex(8)}"
        self._in_parts = False
        self._in_parts = self._shows_parts_only()
        added = tokenizer.added_tokens_decoder
        self._special = {*tokenizer.all_special_ids, *(t for t in added if added[t].special)}
        try:
            self._end_of_last = self._end_of_last_turn()
            end = self._encode(self._turn_end().lstrip())[:1]
        except ValueError as error:
            raise ValueError(f"{error}: use agent.style=plain, or another model") from error
        self._end = end[0] if end and end[0] in {*added, *self._special} else None
        stops = (self._end, tokenizer.eos_token_id, *generation_stops(tokenizer))
        self.stop_token_ids = tuple(dict.fromkeys(t for t in stops if t is not None))

    @property
    def arguments(self) -> Set[str]:
        """What a template is rendered with otherwise than as its variables."""
        return inspect.signature(self._tokenizer.apply_chat_template).parameters.keys()

    def prompt(self, messages: Sequence[Message], shown: Mapping[str, Any] = NOTHING) -> list[int]:
        """Tokens of the whole conversation, up to the start of the assistant's next words.

        `shown` are `tools`, and more variables of the template.
        """
        return self._encode(self.render(messages, shown))

    def words(self, text: str) -> list[int]:
        """Tokens that an assistant samples to say that text, with the one that ends its turn."""
        token_ids = self._encode(text)
        # Some tokenizers put a space before what begins a text, and in a line of its own none.
        line, before = self._encode(f"\n{text}"), self._encode("\n")
        within = line[len(before) :]
        if line[: len(before)] == before and self._says(within) == self._says(token_ids):
            token_ids = within
        return [*token_ids, *self.stop_token_ids[:1]]

    def _says(self, token_ids: Sequence[int]) -> str:
        return "".join(self._tokenizer.decode(list(token_ids)).split())

    def between(
        self,
        before: Sequence[Message],
        said: Message,
        after: Sequence[Message],
        *,
        sampled: Sequence[int],
        shown: Mapping[str, Any] = NOTHING,
    ) -> list[int] | None:
        """Tokens from the end of `sampled`, which said `said`, to the start of the next words.

        None where the template does not show where that turn ends; then only `prompt` is left.
        """
        calls = said.get("tool_calls")
        rest = self.after(before, said, after, shown)
        if calls and rest is not None:
            # What follows is the syntax of the call, which was sampled, up to the stop token.
            ended = bool(sampled) and sampled[-1] in self._special
            end = self._tokenizer.decode([sampled[-1]]) if ended else self._sentinel
            _, found, rest = rest.partition(end)
            if not found:
                return None
        if rest is None:
            return None
        if not calls and sampled and sampled[-1] in self.stop_token_ids:
            token_ids = self._encode_after_words(rest.lstrip())
            if token_ids and token_ids[0] in (sampled[-1], self._end):
                return token_ids[1:]  # the model has ended its turn itself
        return self._encode_after_words(rest)

    def next_turn(
        self,
        system: Sequence[Message],
        text: str,
        *,
        sampled: Sequence[int],
        shown: Mapping[str, Any] = NOTHING,
    ) -> list[int]:
        """Tokens of the user's next message, to follow what was sampled: see `between`.

        What was said before makes no difference to them, which `check_turns` sees to.
        """
        user = {"role": "user", "content": text}
        between = self.between([*system, USER], SAID, [user], sampled=sampled, shown=shown)
        assert between is not None, "check_turns has seen that the template shows it"
        return between

    def after(
        self,
        before: Sequence[Message],
        said: Message,
        after: Sequence[Message],
        shown: Mapping[str, Any] = NOTHING,
    ) -> str | None:
        """What stands after the words, or the last call, of `said`; None if they are not shown."""
        marked = dict(said)
        if calls := said.get("tool_calls"):
            function = {**calls[-1]["function"], "arguments": {"argument": self._sentinel}}
            marked["tool_calls"] = [*calls[:-1], {**calls[-1], "function": function}]
        else:
            marked["content"] = self._sentinel
        _, found, rest = self.render([*before, marked, *after], shown).rpartition(self._sentinel)
        return rest if found else None

    def end_of_call(self, said: Message, shown: Mapping[str, Any]) -> int | None:
        """The token that ends an answer with calls in it; None if the template writes none."""
        rest = self.after([USER], said, [], {"add_generation_prompt": False, **shown})
        special = [token for token in self._encode(rest or "") if token in self._special]
        return special[-1] if special else None

    def check_ends(self) -> None:
        """ValueError unless a token ends the assistant's turn."""
        end = self._end_of_last.strip()
        if not self.stop_token_ids:
            raise ValueError(
                "no token ends an answer: the tokenizer has no eos_token, and neither its chat "
                "template nor generation_config names another: set eos_token, or use another model"
            )
        if end and not {*self._encode(end)} & {*self.stop_token_ids}:
            raise ValueError(
                f"the model's chat template ends an answer with {end!r}, which is no token of its "
                f"tokenizer, so no answer would end there: use agent.style=plain, or another model"
            )

    def _turn_end(self) -> str:
        """What begins with the end of an answer, empty if the template writes none."""
        if self._end_of_last.strip():
            return self._end_of_last
        rest = self.after([USER], SAID, [USER]) or ""
        opening, header = (
            text.rpartition(USER["content"])[0] for text in (self.render([USER]), rest)
        )
        return "" if opening.endswith(header.lstrip()) else rest

    def _end_of_last_turn(self) -> str:
        """What stands after an answer that nothing follows."""
        said = {"role": "assistant", "content": self._sentinel}
        return self._render([USER, said], {"add_generation_prompt": False}).rpartition(
            self._sentinel
        )[2]

    def _shows_parts_only(self) -> bool:
        probe = [{"role": "user", "content": self._sentinel}]
        try:
            if self._sentinel in self.render(probe):
                return False
        except ValueError:
            pass  # it may be the text that it does not understand
        try:
            rendered = self.render([{**probe[0], "content": _parts(self._sentinel)}])
        except ValueError:
            return False
        return self._sentinel in rendered and f"'{self._sentinel}'" not in rendered

    def render(self, messages: Sequence[Message], shown: Mapping[str, Any] = NOTHING) -> str:
        """The conversation as the template writes it, up to the start of the next words."""
        return self._render(messages, {"add_generation_prompt": True, **shown})

    def _render(self, messages: Sequence[Message], shown: Mapping[str, Any]) -> str:
        if self._in_parts:
            messages = [
                {**message, "content": _parts(message["content"])}
                if isinstance(message.get("content"), str)
                else message
                for message in messages
            ]
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, **shown
            )
        except Exception as error:  # the boundary to the template, which is the model's own code
            raise ValueError(f"the model's chat template refuses the messages: {error}") from error
        return rendered

    def _encode(self, text: str) -> list[int]:
        # The template has written the special tokens already.
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return token_ids

    def _encode_after_words(self, text: str) -> list[int]:
        """As it is encoded within a text: some tokenizers put a space before what begins one."""
        words = self._encode("a")
        token_ids = self._encode(f"a{text}")
        if token_ids[: len(words)] == words:
            return token_ids[len(words) :]
        return self._encode(text)


def generation_stops(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a text by the generation_config of the tokenizer's model, if it has one.

    Reads files: not for the event loop.
    """
    stops: int | list[int] | None = None
    if path := getattr(tokenizer, "name_or_path", ""):
        from transformers import GenerationConfig  # noqa: PLC0415  (seconds to import)

        with contextlib.suppress(OSError):  # a tokenizer without a model
            stops = GenerationConfig.from_pretrained(path).eos_token_id
    return (stops,) if isinstance(stops, int) else tuple(stops or ())


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]
