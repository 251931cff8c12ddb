"""Settings of evaluation."""

from typing import Literal

from pydantic import Field

from flash.section import Section


class EvalConfig(Section):
    """Evaluation on held-out tasks."""

    tasks: int = Field(64, ge=1, description="held-out tasks of an evaluation")
    samples: int = Field(1, ge=1, description="episodes of each of these tasks")
    temperature: float = Field(1.0, gt=0, description="of sampling")
    mode: Literal["pause", "beside"] = Field(
        "pause",
        description="pause: rollout starts nothing meanwhile; beside: it goes on, and evaluation "
        "has workers of its own, whose weights stay as they are. At the ends of a run: pause",
    )
    workers: int = Field(1, ge=1, description="of the engine's, for eval.mode=beside")
