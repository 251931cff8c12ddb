"""Settings of the agent. It lives outside the engine, which finds it by name."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from flash.config.names import check_names
from flash.section import Names, Secret, Section, can_be_had, is_url
from flash.tools.config import McpConfig

# The environment variables that a command finds for its episode.
GIVEN = (
    "OPENAI_BASE_URL", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY",
    "FLASH_ROLES", "FLASH_TASK",
)  # fmt: skip


class RoleConfig(Section):
    """One of several who play an episode together."""

    trained: bool = Field(
        True, description="false: it plays as the policy is, and nothing that it says is trained on"
    )
    share: float = Field(
        1.0, description="of the episode's reward, where the agent answers none for this role"
    )
    earlier: int | None = Field(
        None,
        ge=1,
        description="steps: it plays the policy as it was after the last multiple of so many, on "
        "a worker of its own; not trained",
    )
    url: str = Field(
        "", description="of OpenAI's protocol, as https://host/v1: another model's; not trained"
    )
    model: str = Field("", description="at that URL")
    api_key: Secret = Field(
        SecretStr(""), description="bearer token of that URL, or $NAME of a variable"
    )

    @property
    def learns(self) -> bool:
        return self.trained and not self.url and self.earlier is None

    @model_validator(mode="after")
    def _is_one_player(self) -> Self:
        if self.url and not is_url(self.url):
            raise ValueError(f"url={self.url!r} is not a URL: write https://host/v1")
        if bool(self.url) != bool(self.model):
            raise ValueError(
                f"url={self.url!r} with model={self.model!r}: give both, or neither for the policy"
            )
        if self.url and self.earlier is not None:
            raise ValueError(
                f"url={self.url!r} with earlier={self.earlier}: it is another model or an earlier "
                f"policy: leave one out"
            )
        if "trained" in self.model_fields_set and self.trained and not self.learns:
            raise ValueError(
                "trained=true is for a role that plays the policy: leave out url and earlier, or "
                "trained"
            )
        return self


class AgentConfig(Section):
    """How an agent talks to the policy."""

    run: str | tuple[str, ...] = Field(
        "",
        description="an agent of your own, as a coroutine function module:name, or as a command "
        "[python, agent.py, …]; it brings its own environment",
    )
    env: Names = Field(
        (),
        description="environment variables of an agent that is a command, beside PATH, HOME and "
        "the like: NAME passes this process's own, NAME=value sets one, kept in config.yaml",
    )
    ignore: Names = Field(
        (),
        description="what its requests may ask for in vain (temperature, tool_choice, image_url, "
        "…, or patterns, x_*; * is all that is not honoured); anything else that training can't "
        "allow is refused",
    )
    roles: dict[str, RoleConfig] = Field(
        {},
        description="of an agent of your own in which several play: each by a key of its own, as "
        "{planner: {}, critic: {trained: false}}",
    )
    samples: Literal["whole", "turns"] = Field(
        "whole", description="what an episode is trained as: one sample, or one for each turn"
    )
    style: str = Field("plain", description="plain, chat, or module:Class")
    style_options: dict[str, Any] = Field({}, description="the style's arguments")
    max_turns: int | None = Field(None, ge=1, description="responses in an episode; null: no limit")
    max_tokens: int = Field(256, ge=1, description="of one response")
    max_sequence_tokens: int = Field(
        4096,
        ge=2,
        description="of a whole episode, at most what the model reads; an observation that leaves "
        "no room to answer ends the episode before it, with the reward it has",
    )
    temperature: float = Field(1.0, gt=0, description="of sampling; the trainer accounts for it")
    step_timeout_s: float = Field(60.0, gt=0, description="for one environment step")
    episode_timeout_s: float = Field(1800.0, gt=0, description="for one episode")

    tools: Names = Field(
        (),
        description="functions that the policy can call, module:name; with style=chat",
    )
    mcp: tuple[McpConfig, ...] = Field((), description="MCP servers whose tools it can call")
    tool_timeout_s: float = Field(60.0, gt=0, description="for one call of a tool")
    tool_chars: int = Field(20_000, ge=1, description="of one result; what is longer is cut")
    tool_processes: int = Field(
        2, ge=1, description="that run those functions which are no coroutines"
    )

    sandbox: Literal["none", "local"] = Field(
        "none",
        description="where functions and MCP commands run: none: in processes of this machine; "
        "local: in sandboxes (bubblewrap), without network, functions in one of each episode's own",
    )

    @property
    def has_tools(self) -> bool:
        """Whether the policy can call any."""
        return bool(self.tools or self.mcp)

    @model_validator(mode="before")
    @classmethod
    def _samples_the_whole_distribution(cls, given: Any) -> Any:
        for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
            if isinstance(given, Mapping) and name in given:
                raise ValueError(
                    f"agent.{name}={given[name]}: the engine's logprobs would be those of a cut "
                    f"distribution, which the trainer does not have, and every correction for "
                    f"staleness would be wrong: leave it out, and use agent.temperature"
                )
        return given

    @field_validator("run", mode="before")
    @classmethod
    def _run_is_a_name_or_a_command(cls, value: Any) -> Any:
        if isinstance(value, str):
            good = not value or (":" in value and " " not in value)
        else:
            good = (
                isinstance(value, list | tuple)
                and len(value) > 0
                and all(isinstance(word, str) for word in value)
            )
        if not good:
            raise ValueError(
                "must be a coroutine function, module:name, or a command as a list of texts: "
                "[python, agent.py]"
            )
        return value

    @field_validator("env")
    @classmethod
    def _env_can_be_had(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in (entry.partition("=")[0] for entry in value):
            if name in GIVEN:
                raise ValueError(f"{name} is each episode's own: leave it out")
        return can_be_had(value)

    @field_validator("roles")
    @classmethod
    def _somebody_learns(cls, value: dict[str, RoleConfig]) -> dict[str, RoleConfig]:
        check_names(value)
        if value and not any(role.learns for role in value.values()):
            raise ValueError(
                f"of {', '.join(value)} none is trained: let one of them play the policy, with "
                f"trained=true"
            )
        return value

    @field_validator("ignore")
    @classmethod
    def _ignore_can_be_ignored(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value:
            from flash.door.schema import Ignore  # noqa: PLC0415  (imports a server)

            Ignore(value)
        return value
