"""Whether conversations in a model's chat template can grow turn by turn, and their turns end."""

from collections.abc import Mapping, Sequence
from typing import Any

from flash.conversation import NOTHING, SAID, USER, ChatTemplate, Message

_NAMES = {"system": "the system message", "user": "an observation", "assistant": "an answer"}
_OTHERWISE = "use agent.style=plain, or another model"
_WITHOUT_TOOLS = "leave agent.tools and agent.mcp out, or use another model"
_WITHOUT_SYSTEM = f"set agent.style_options.system='', or {_OTHERWISE}"


def check_turns(
    template: ChatTemplate, *, system: bool, shown: Mapping[str, Any] = NOTHING
) -> None:
    """ValueError unless `ChatTemplate.next_turn` gives what the template of the whole would.

    Of three turns each message must be shown once. Only the start of the assistant's words may
    differ: see `_opens_alike`. `system`: whether there is a system message;
    `shown`: as for `ChatTemplate.prompt`.
    """
    first = [{"role": "system", "content": "system-words"}] if system else []
    turns = [
        {"role": role, "content": f"{role}-words-{number}"}
        for number, role in enumerate(("user", "assistant", "user", "assistant", "user"))
    ]
    try:
        whole = template.render([*first, *turns], shown)
        grown = template.render([*first, turns[0]], shown)
        for said, user in ((turns[1], turns[2]), (turns[3], turns[4])):
            after = template.after([*first, USER], SAID, [user], shown)
            grown += said["content"] + (after or "")
    except ValueError as error:
        raise ValueError(f"{error}: {_WITHOUT_SYSTEM if system else _OTHERWISE}") from error
    for message in (*first, *turns):
        role = message["role"]
        for text in (whole, grown):
            if (times := text.count(message["content"])) != 1:
                raise ValueError(
                    f"the model's chat template shows {_NAMES[role]} {times} times in a "
                    f"conversation of three turns, in place of once: "
                    f"{_WITHOUT_SYSTEM if role == 'system' else _OTHERWISE}"
                )
    words = [turn["content"] for turn in turns]
    for at, (expected, found) in enumerate(
        zip(_split(whole, words), _split(grown, words), strict=True)
    ):
        if expected != found and not (at in (1, 3) and _opens_alike(template, expected, found)):
            raise ValueError(
                f"the model's chat template writes {expected!r} in a conversation where it wrote "
                f"{found!r} turn by turn: {_OTHERWISE}"
            )
    template.check_ends()


def check_results(
    template: ChatTemplate, call: Message, result: Message, shown: Mapping[str, Any]
) -> None:
    """ValueError unless results of calls, and what follows them, are written as they are added.

    Of a conversation in which a tool is called the part between the call's argument and the end is
    compared, as `check_turns` does. `call` has the argument `call-words`, `result` says
    `result-words`.
    """
    answer = {"role": "assistant", "content": "answer-words"}
    user = {"role": "user", "content": "user-words"}
    whole = template.render([USER, call, result, answer, user], shown).partition("call-words")[2]
    grown = template.after([USER], call, [result], shown) or ""
    grown += answer["content"] + (template.after([USER], SAID, [user], shown) or "")
    words = ["result-words", *(message["content"] for message in (answer, user))]
    for text in (whole, grown):
        for word in words:
            if text.count(word) != 1:
                raise ValueError(
                    f"the model's chat template shows {word!r} {text.count(word)} times in a "
                    f"conversation with a tool call, in place of once: {_WITHOUT_TOOLS}"
                )
    for at, (expected, found) in enumerate(
        zip(_split(whole, words), _split(grown, words), strict=True)
    ):
        if expected != found and not (at == 1 and _opens_alike(template, expected, found)):
            raise ValueError(
                f"the model's chat template writes {expected!r} around the result of a tool call "
                f"where it wrote {found!r} as it was added: {_WITHOUT_TOOLS}"
            )


def _opens_alike(template: ChatTemplate, past: str, prompt: str) -> bool:
    """Of what stands before an answer: one may go on where the other ends, with what opens
    reasoning; or, after a start of the answer, with its channel, which the model writes itself."""
    starts = template.render([USER]) != template.render([USER], {"add_generation_prompt": False})
    return prompt.startswith(past.rstrip()) or (starts and past.startswith(prompt))


def _split(text: str, words: Sequence[str]) -> list[str]:
    """What stands before, between and after the words, which are in it once each."""
    parts = []
    for word in words:
        part, _, text = text.partition(word)
        parts.append(part)
    return [*parts, text]
