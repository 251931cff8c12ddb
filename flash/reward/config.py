"""The settings of each way to a reward, found by name.

reward: {name: process, run: "my_rewards:score", timeout_s: 10}
"""

import inspect
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, model_validator

from flash import registry
from flash.reward.prompt import PROMPT, check_prompt
from flash.section import Secret, Section, is_url

_OF = "the episode"
_RUN = "module:name, a function of the episode (flash.types.Transcript)"


class EnvReward(Section):
    """What the environment, or an agent of your own, gave."""

    name: Literal["env"] = "env"


class StageSettings(Section):
    """What a reward of a stage of its own has."""

    name: Any
    concurrency: int = Field(16, ge=1, description="episodes that are scored at a time")
    timeout_s: float = Field(60.0, gt=0, description="for one attempt to score an episode")
    retries: int = Field(1, ge=0, description="attempts after the first; then the episode fails")


class FunctionReward(StageSettings):
    """A coroutine function, in this process."""

    name: Literal["function"] = "function"
    run: str = Field(description=_RUN)

    @model_validator(mode="after")
    def _is_a_coroutine_function(self) -> Self:
        if not inspect.iscoroutinefunction(registry.function(self.run, "reward.run", of=_OF)):
            raise ValueError(
                f"reward.run={self.run!r} is not a coroutine function, so it would block all "
                f"episodes: write async def, or use reward.name=process"
            )
        return self


class ProcessReward(StageSettings):
    """A function that may block or hang, in processes that are killed when it does."""

    name: Literal["process"] = "process"
    run: str = Field(description=_RUN)
    concurrency: int = Field(2, ge=1, description="processes, each scoring one episode at a time")

    @model_validator(mode="after")
    def _is_a_plain_function(self) -> Self:
        if inspect.iscoroutinefunction(registry.function(self.run, "reward.run", of=_OF)):
            raise ValueError(
                f"reward.run={self.run!r} is a coroutine function: use reward.name=function, or "
                f"write def"
            )
        return self


class JudgeReward(StageSettings):
    """A language model grades the episode: the policy itself, or one at a URL."""

    name: Literal["judge"] = "judge"
    url: str = Field("", description="of OpenAI's protocol, as https://host/v1; none: the policy")
    model: str = Field("", description="at that URL")
    api_key: Secret = Field(
        SecretStr(""), description="bearer token of that URL, or $NAME of a variable"
    )
    prompt: str = Field(
        "", description="with {text} or {response}, and {max_score}; none: one that shows {text}"
    )
    max_score: float = Field(10.0, gt=0, description="the best grade; the reward is divided by it")
    max_tokens: int = Field(64, ge=1, description="of the judge's answer")

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        if self.url and not is_url(self.url):
            raise ValueError(f"reward.url={self.url!r} is not a URL: write https://host/v1")
        if bool(self.url) != bool(self.model):
            raise ValueError(
                f"reward.url={self.url!r} with reward.model={self.model!r}: give both, or neither "
                f"for the policy as its own judge"
            )
        try:
            check_prompt(self.prompt or PROMPT)
        except ValueError as error:
            raise ValueError(f"reward.prompt: {error}") from error
        return self


AnyReward = Annotated[
    EnvReward | FunctionReward | ProcessReward | JudgeReward, Field(discriminator="name")
]
