"""What a judge is asked, and whether it can be asked so; imports nothing."""

from collections import defaultdict
from typing import Any

PROMPT = """\
Below is what an agent read and said.

{text}

How well did it do? Give a grade from 0 (it failed) to {max_score:g} (nothing could be better).
Reply with the number alone."""


def check_prompt(prompt: str) -> None:
    """ValueError for a format string that asks for what there is not, or not for the episode."""
    known: dict[str, Any] = {"text": "", "response": "", "seed": 0, "reward": 0.0, "max_score": 1.0}
    known["options"] = defaultdict(str)  # each task has others
    try:
        prompt.format(**known)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{error!r} in the prompt: it may have {', '.join(f'{{{name}}}' for name in known)}; "
            f"any other brace is written twice"
        ) from error
    if "{text" not in prompt and "{response" not in prompt:
        raise ValueError("the prompt shows the judge nothing: put {text} or {response} in it")
