"""The `chat` style: the model's own chat template, extended turn by turn."""

from collections.abc import Sequence
from typing import Any

from flash.types import Observation

_SENTINEL = "\u2402sampled\u2403"


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
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: use "
                f"agent.style=plain, or an instruction-tuned model"
            )
        self._tokenizer = tokenizer
        self._system = [{"role": "system", "content": system}] if system else []
        self._instruction = instruction
        self._commands = commands
        end_of_turn = self._after_assistant("next")[:1]
        special = set(tokenizer.all_special_ids)
        stops = [*end_of_turn, tokenizer.eos_token_id]
        self.stop_token_ids = tuple(
            dict.fromkeys(t for t in stops if t is not None and t in special)
        )

    def first(self, observation: Observation) -> list[int]:
        goal = observation.info.get("goal")
        text = self._message(observation)
        if goal and goal not in text:
            text = f"Your task: {goal}\n\n{text}"
        messages = [*self._system, {"role": "user", "content": text}]
        rendered = self._render(messages, add_generation_prompt=True)
        return self._encode(rendered)

    def next(self, observation: Observation, sampled: Sequence[int]) -> list[int]:
        between = self._after_assistant(self._message(observation))
        if sampled and between and sampled[-1] == between[0]:
            return between[1:]  # the model has ended its turn itself
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

    def _after_assistant(self, text: str) -> list[int]:
        """Tokens from the end of an assistant's words to the start of its next ones."""
        messages = [
            *self._system,
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _SENTINEL},
            {"role": "user", "content": text},
        ]
        rendered = self._render(messages, add_generation_prompt=True)
        return self._encode(rendered.rpartition(_SENTINEL)[2])

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        rendered: str = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return rendered

    def _encode(self, text: str) -> list[int]:
        # The template has written the special tokens already.
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return token_ids
