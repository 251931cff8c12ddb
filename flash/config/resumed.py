"""What a resume may change of a run's configuration, and what it says of it.

Each field is of one kind:

fixed  what the run has gone on from since its first step: another value is refused
told   what is learned, or what is measured, depends on it: the new value holds from the next step
       on, and the resume says so
free   neither depends on it
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple

from pydantic import BaseModel

from flash.config.model import SMALL
from flash.config.names import BARE
from flash.config.run import Config

Kind = Literal["fixed", "told", "free"]
_LONGEST_SHOWN = 80  # characters of a value


def _of(section: str, fields: str) -> list[str]:
    return [f"{section}.{field}" for field in fields.split()]


_OF_ADAPTERS = _of("trainer.lora", "rank alpha targets")

# A section that is here by its own name is of one kind, with all that it will ever hold.
KINDS: Final[Mapping[str, Kind]] = {
    **dict.fromkeys(("model", "seed", "policy", "warm_start", *_OF_ADAPTERS, "log.url"), "fixed"),
    **dict.fromkeys(
        (
            *["alpha", "batch_size", "group_size", "publish_every", "task_sets"],
            *_of("env", "name options eval_options"),
            *_of("engine", "dtype update_mode vllm_args sglang_args"),
            *_of("agent", "run env ignore roles samples style style_options tools mcp sandbox"),
            *_of("agent", "tool_chars max_turns max_tokens max_sequence_tokens temperature"),
            *_of("reward", "name run url model prompt max_score max_tokens"),
            *_of("rollout", "schedule redundant_groups redundant_episodes filters on_stale"),
            *_of("rollout", "max_attempts max_regenerations adaptive_alpha reuse expert"),
            *_of("trainer", "objective advantages kl critic aggregation fixed_length"),
            *_of("trainer", "entropy_bonus learning_rate warmup_steps decay_steps weight_decay"),
            *_of("trainer", "betas max_grad_norm mini_batches dtype router_replay"),
            *_of("eval", "tasks samples temperature"),
        ),
        "told",
    ),
    **dict.fromkeys(
        (
            *["name", "runs_dir", "steps", "stream", "eval_every", "transcripts", "checkpoint"],
            *_of("env", "hosts"),
            *_of("engine", "kind workers urls api_key max_running cache_tokens threads transport"),
            *_of("engine", "tensor_parallel devices gpu_memory colocated door_port gap_limit"),
            *_of("engine", "start_timeout_s request_timeout_s progress_timeout_s"),
            *_of("agent", "step_timeout_s episode_timeout_s tool_timeout_s tool_processes"),
            *_of("reward", "api_key concurrency retries timeout_s"),
            *_of("rollout", "replicate max_filtered stall_timeout_s on_stall"),
            # How a step is divided among processes and passes: it stays the same but for rounding.
            *_of("trainer", "ranks shard_size sequence_ranks threads tokens_per_micro_batch"),
            *_of("trainer", "gradient_checkpointing compile lora.publish"),
            *_of("trainer", "start_timeout_s step_timeout_s max_restarts"),
            *_of("eval", "mode workers"),
            *_of("log", "keep max_lag_s timeout_s"),
            *["explorers", "cluster"],
        ),
        "free",
    ),
}

# Why a fixed field is.
_FIXED_BY = {
    "model": "which is what its checkpoint has gone on from",
    "seed": "which decides the order of its tasks",
    "log.url": "which is where its log is",
    **dict.fromkeys(_OF_ADAPTERS, "which its adapters were made with"),
}
# With model=small: what that policy was made from. With another model nothing is made of these.
_OF_SMALL = ("policy", "warm_start", "env.name", "env.options")
_MADE_FROM = "which is what its small policy was made from"

# What the episodes of a group must have in common, or their rewards can't be compared.
_OF_A_GROUP = (
    *("group_size", "env.name", "env.options", "reward", "brought"),
    *_of("agent", "run roles samples style style_options tools mcp sandbox"),
)
_SETS = "task_sets"


class Difference(NamedTuple):
    """A field that is not as it was. A value that one side does not have is None."""

    field: str
    was: Any
    now: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.field} {shown(self.was)} → {shown(self.now)}"


def differences(before: Mapping[str, Any], now: Config) -> list[Difference]:
    """Every field that is not as it was before, in the order of the configuration.

    `before` is the run's configuration as it was kept, which need not be one of this version: what
    it lacks had its default; what is not known here any more is told.
    """
    return [
        Difference(field, was, value, _kind(field, was, value, now.model == SMALL))
        for field, was, value in _pairs(before, now)
        if field != "checkpoint.resume"  # of a start, not of the run
    ]


def check_resumed(found: Iterable[Difference]) -> None:
    """ValueError for the first field that a run can't have otherwise than before."""
    for field, was, now, kind in found:
        if kind == "fixed":
            why = _FIXED_BY.get(field, _MADE_FROM)
            raise ValueError(
                f"{field}={now!r} with checkpoint.resume: the run began with {was!r}, {why}: "
                f"leave {field} as it was, or start anew under another name"
            )


def told(found: Iterable[Difference], *, first_step: int) -> str:
    """In a line, what is otherwise from that step on; empty if nothing that matters is."""
    changed = [str(difference) for difference in found if difference.kind == "told"]
    if not changed:
        return ""
    return f"settings that are new from step {first_step} on: {', '.join(changed)}"


def training_settings_differ(found: Iterable[Difference]) -> bool:
    """Whether a batch of before would be trained to other weights now, but for rounding."""
    return any(kind == "told" and _is_in(field, "trainer") for field, _, _, kind in found)


def groups_begin_anew(found: Iterable[Difference], *, task_set: str = "") -> bool:
    """Whether a set's groups that were under way, or ready, can't be gone on with: they have
    another size, or their next episodes would not be like their first."""
    return any(
        _is_in(field := _of_run(difference.field), name) or field == _SETS
        for difference in found
        if _set_of(difference.field) in (None, task_set)
        for name in _OF_A_GROUP
    )


def is_free(field: str) -> bool:
    """Whether neither what is learned nor what is measured depends on it."""
    return _kind(field, None, None, of_small=False) == "free"


def shown(value: Any) -> str:
    """A value in few words, as YAML has it; of a section with variants, its name first."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping) and "name" in value:
        rest = ", ".join(f"{name} {shown(of)}" for name, of in value.items() if name != "name")
        return f"{value['name']} ({rest})" if rest else str(value["name"])
    text = value if isinstance(value, str) and value else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _of_run(field: str) -> str:
    """The field of a run that a task set's stands for; `task_sets` if it is all of a set."""
    if not _is_in(field, _SETS):
        return field
    own = ".".join(field.split(".")[2:])
    return {"": _SETS, "weight": "batch_size", "filters": "rollout.filters"}.get(own, own)


def _set_of(field: str) -> str | None:
    """The task set whose field it is; None if it is the run's."""
    return field.split(".")[1] if field.startswith(f"{_SETS}.") else None


def _kind(field: str, was: Any, now: Any, of_small: bool) -> Kind:
    field = _of_run(field)
    if field == _SETS and of_small:
        return "fixed"
    if any(_is_in(field, name) for name in _OF_SMALL):
        if of_small:
            return "fixed"
        return "told" if _is_in(field, "env") else "free"
    if field == "log.url" and was and now:
        return "free"  # the same database, for all that is kept of its address
    return next((kind for name, kind in KINDS.items() if _is_in(field, name)), "told")


def _is_in(field: str, section: str) -> bool:
    return f"{field}.".startswith(f"{section}.")


def _pairs(
    before: Mapping[str, Any], now: BaseModel, prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """The innermost fields that differ, with both values."""
    values = now.model_dump(mode="json")
    defaults = type(now).model_construct().model_dump(mode="json")
    for name, value in values.items():
        field, was, part = (
            f"{prefix}{name}",
            before.get(name, defaults.get(name)),
            getattr(now, name),
        )
        if isinstance(part, BaseModel):
            was = _section(name, was)
            variant = type(now).model_fields[name].discriminator
            if variant and was.get("name", defaults[name]["name"]) != value["name"]:
                yield field, was, value
            else:
                yield from _pairs(was, part, f"{field}.")
        elif isinstance(value, Mapping) and isinstance(was, Mapping):
            yield from _entries(was, value, field)
        elif was != value:
            yield field, was, value
    for name in before:
        if name not in values:
            yield f"{prefix}{name}", before[name], None


def _entries(
    before: Mapping[str, Any], now: Mapping[str, Any], field: str
) -> Iterator[tuple[str, Any, Any]]:
    """Likewise of plain values."""
    for key in dict.fromkeys((*now, *before)):
        was, value = before.get(key), now.get(key)
        if isinstance(was, Mapping) and isinstance(value, Mapping):
            yield from _entries(was, value, f"{field}.{key}")
        elif (key in before, was) != (key in now, value):
            yield f"{field}.{key}", was, value


def _section(name: str, value: Any) -> Mapping[str, Any]:
    """What was kept of a section, which somebody may have shortened."""
    if isinstance(value, str) and name in BARE:
        return {BARE[name]: value}
    return value if isinstance(value, Mapping) else {}
