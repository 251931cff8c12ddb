"""Whether conversations in a model's chat template can grow turn by turn, and their turns end."""

from collections.abc import Sequence

from flash.conversation import SAID, USER, ChatTemplate

_NAMES = {"system": "the system message", "user": "an observation", "assistant": "an answer"}
_OTHERWISE = "use agent.style=plain, or another model"
_WITHOUT_SYSTEM = f"set agent.style_options.system='', or {_OTHERWISE}"


def check_turns(template: ChatTemplate, *, system: bool) -> None:
    """ValueError unless `ChatTemplate.next_turn` gives what the template of the whole would.

    Of three turns each message must be shown once. Only the start of the assistant's words may
    differ, by what opens reasoning, which templates leave out of the past. `system`: whether there
    is a system message.
    """
    first = [{"role": "system", "content": "system-words"}] if system else []
    turns = [
        {"role": role, "content": f"{role}-words-{number}"}
        for number, role in enumerate(("user", "assistant", "user", "assistant", "user"))
    ]
    try:
        whole, grown = template.render([*first, *turns]), template.render([*first, turns[0]])
        for said, user in ((turns[1], turns[2]), (turns[3], turns[4])):
            after = template.after([*first, USER], SAID, [user])
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
        before_answer = at in (1, 3)
        same = found.startswith(expected.rstrip()) if before_answer else found == expected
        if not same:
            raise ValueError(
                f"the model's chat template writes {expected!r} in a conversation where it wrote "
                f"{found!r} turn by turn: {_OTHERWISE}"
            )
    template.check_ends()


def _split(text: str, words: Sequence[str]) -> list[str]:
    """What stands before, between and after the words, which are in it once each."""
    parts = []
    for word in words:
        part, _, text = text.partition(word)
        parts.append(part)
    return [*parts, text]
