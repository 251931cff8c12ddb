"""The `chat` style: the model's own chat template, extended turn by turn."""

from collections.abc import Sequence
from typing import Any

from flash.conversation import ChatTemplate
from flash.types import Observation


class ChatStyle:
    """Conversations in the model's chat template; one user message for each observation.

    Sampled tokens stay as they were sampled: of each later turn only what the template puts
    after the assistant's words is tokenised.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        system: the system message; "" for none.
        instruction: ends each observation's message.
        commands: list the admissible commands, where the environment tells them.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        system: str = "You act in a text environment. Reply with one command and nothing else.",
        instruction: str = "",
        commands: bool = True,
    ) -> None:
        self._template = ChatTemplate(tokenizer)
        self._tokenizer = tokenizer
        self._system = [{"role": "system", "content": system}] if system else []
        self._instruction = instruction
        self._commands = commands
        self.stop_token_ids = self._template.stop_token_ids

    def first(self, observation: Observation) -> list[int]:
        goal = observation.info.get("goal")
        text = self._message(observation)
        if goal and goal not in text:
            text = f"Your task: {goal}\n\n{text}"
        return self._template.prompt([*self._system, {"role": "user", "content": text}])

    def next(self, observation: Observation, sampled: Sequence[int]) -> list[int]:
        between = self._template.between(
            [*self._system, {"role": "user", "content": "?"}],
            {"role": "assistant", "content": ""},
            [{"role": "user", "content": self._message(observation)}],
            sampled=sampled,
        )
        assert between is not None, "the template leaves out what the assistant says"
        return between

    def action(self, sampled: Sequence[int]) -> str:
        """The last line of what was said; of a line `Action: …`, what follows the colon."""
        text: str = self._tokenizer.decode(list(sampled), skip_special_tokens=True)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            return ""
        _, marker, after = lines[-1].rpartition("Action:")
        return after.strip() if marker else lines[-1]

    def _message(self, observation: Observation) -> str:
        parts = [observation.text]
        commands = observation.info.get("admissible_commands")
        if self._commands and commands:
            parts.append("You can: " + ", ".join(commands))
        if self._instruction:
            parts.append(self._instruction)
        return "\n".join(parts)
