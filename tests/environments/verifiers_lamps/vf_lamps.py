"""An environment as packages of verifiers are: a lamp to be found with a tool, in some turns."""

import os
import sys
import time

import verifiers as vf
from datasets import Dataset

PLACES = ("desk", "shelf", "floor")


def look(at: str) -> str:
    """Looks at a place.

    Args:
        at: the place.
    """
    if at == "clock":
        print("looks at the clock", file=sys.stderr, flush=True)
        time.sleep(1000)  # a tool that blocks the whole process
    return f"{at}: a lamp, perhaps"


class Asked(vf.ToolEnv):
    """After the tools it asks once more, as a user."""

    @vf.stop
    async def no_tools_called(self, state: vf.State) -> bool:
        return len(state["trajectory"]) >= 3

    async def env_response(self, messages, state, **kwargs):
        if _of(messages[-1], "tool_calls"):
            return await super().env_response(messages, state, **kwargs)
        return [{"role": "user", "content": "Are you sure?"}]


def _of(message, field):
    return message.get(field) if isinstance(message, dict) else getattr(message, field, None)


def found(completion, answer):
    return float(answer in (_of(completion[-1], "content") or ""))


def brief(completion):
    return 1.0 / len(completion)


def compared(completions):
    return [0.0 for _ in completions]


def load_environment(
    held_out: bool = True, sampling: dict | None = None, grouped: bool = False
) -> vf.Environment:
    print("loads lamps", file=sys.stderr, flush=True)

    def rows(places):
        return Dataset.from_list(
            [{"question": f"Where is lamp {n}?", "answer": at} for n, at in enumerate(places)]
        )

    rubric = vf.Rubric(funcs=[found, brief], weights=[1.0, 0.0])
    if grouped:
        rubric.add_reward_func(compared)
    return Asked(
        dataset=rows(PLACES),
        eval_dataset=rows([os.environ.get("LAMP", "attic")]) if held_out else None,
        tools=[look],
        system_prompt="Find the lamp.",
        rubric=rubric,
        sampling_args=sampling,
    )
