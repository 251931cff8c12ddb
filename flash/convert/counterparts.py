"""What of ours stands for what other systems name: environments, data, losses, GPUs."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from flash import registry
from flash.config.model import check_model
from flash.config.source import presets, read_mapping
from flash.convert.rules import (
    Answer,
    Becomes,
    Depends,
    Given,
    Missing,
    NoMeaning,
    Placeholder,
    is_field,
)
from flash.convert.source import Source
from flash.trainer.advantage_settings import AnyAdvantages
from flash.trainer.objectives.settings import SETTINGS

_ENVIRONMENTS = {
    "alfworld": "alfworld",
    "frozenlake": "frozen_lake",
    "sokoban": "sokoban",
    "webshop": "webshop",
    "reasoninggym": "reasoning_gym",
}  # fmt: skip
_DTYPES = {
    "bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32",
    "auto": "auto",
}  # fmt: skip
_CUT = (
    "refused: logprobs of a cut distribution make every correction for staleness wrong; use "
    "agent.temperature"
)
_WHOLE = "all is sampled from the whole distribution"
TOP_P = Depends((1,), _WHOLE, _CUT)
TOP_K = Depends((-1, 0), _WHOLE, _CUT)
REPETITION = Depends((1,), "off", _CUT)
RATE = Depends(
    ("constant", "constant_with_warmup"),
    "constant after the warm-up, as without trainer.decay_steps",
    "there is a linear decay to 0: trainer.decay_steps, in optimizer steps",
)
AGGREGATIONS = {
    "token-mean": "token_mean",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-mean": "sequence_mean",
}
QUESTIONS = "questions"
OF_QUESTIONS = (
    "env.name", "env.options", "agent.style", "agent.style_options", "agent.max_turns"
)  # fmt: skip
OF_FILES = "data sets; here env.options.question and answer name their fields"


def environment(name: str) -> str | None:
    """The registered environment that another system's name of a world means, if there is one."""
    plain = re.sub(r"[^a-z]", "", name.lower())
    ours = next((ours for theirs, ours in _ENVIRONMENTS.items() if theirs in plain), None)
    if ours is None:
        return None
    try:
        registry.environment(ours)
    except ValueError:
        return None
    return ours


def no_environment(why: str) -> Placeholder:
    """One that loads, and refuses to start until it is told what to ask."""
    return Placeholder({"env.name": QUESTIONS}, f"{why}; env.name: {QUESTIONS} stands in its place")


def questions() -> dict[str, Any]:
    """How the preset gsm8k asks the questions of a file."""
    preset = read_mapping(presets()["gsm8k"], "env: NAME")["agent"]
    fields = ("style", "style_options", "max_turns")
    return {"env.name": QUESTIONS} | {f"agent.{field}": preset[field] for field in fields}


def questions_of(given: Given, **options: Any) -> Answer:
    """The data set of that path, files or a name on the hub, read with these options."""
    named = given.value if isinstance(given.value, list) else [given.value]
    paths = [str(path) for path in named]
    if unset := [path for path in paths if "$" in path]:
        return Placeholder(
            questions(),
            f"{', '.join(unset)} names a variable that is not set: give env.options.path",
        )
    return questions() | {"env.options": {"path": paths if len(paths) > 1 else paths[0], **options}}


def model(given: Given) -> Answer:
    """A hub name, or a directory; of one that is not here its name is kept, which no run finds."""
    name = str(given.value)
    if "$" in name:
        return Placeholder(
            {"model": "model"}, f"{name} names a variable that is not set: set model"
        )
    try:
        check_model(name)
    except ValueError as error:
        kept = re.sub(r"[^\w.-]", "-", Path(name).name).strip("-.") or "model"
        return Placeholder(
            {"model": kept}, f"{name}: {error}. Give the directory as it is where the run will be"
        )
    return {"model": name}


MODEL = Becomes(("model",), "a hub name or a directory, likewise", model)


def run_name(value: Any) -> str:
    """A name of a run: one folder's."""
    return re.sub(r"[^\w.-]+", "_", str(value)).strip("_.-")[:200] or "run"


def dtype(field: str) -> Becomes:
    """A number format; half precision but bfloat16 is refused."""

    def how(given: Given) -> Answer:
        if (ours := _DTYPES.get(str(given.value))) is None:
            return Missing(
                f"{given.value} is refused: there are {', '.join(set(_DTYPES.values()))}"
            )
        return {field: ours}

    return Becomes((field,), "a number format", how)


def server_args(option: str) -> Becomes:
    """An option of vLLM's servers, passed on; --no-… for false."""

    def how(given: Given) -> Answer:
        if isinstance(given.value, bool):
            return {"engine.vllm_args": [f"--{'' if given.value else 'no-'}{option}"]}
        return {"engine.vllm_args": [f"--{option}={given.value}"]}

    return Becomes(("engine.vllm_args",), f"vLLM's own --{option}", how)


def clip(field: str, name: str, value: Any) -> Answer:
    """A setting of the objective of that name, if it has it."""
    if field not in SETTINGS[name].model_fields:
        return Missing(f"the objective {name} has no {field}: see docs/objectives.md")
    return {f"trainer.objective.{field}": value}


def clips(objective: Callable[[Source], str], *fields: str) -> Becomes:
    """Bounds of a token's ratio, settings of the objective that a configuration names."""

    def how(given: Given) -> Answer:
        found: dict[str, Any] = {}
        for field in fields:
            answer = clip(field, objective(given.source), given.value)
            if not isinstance(answer, dict):
                return answer
            found |= answer
        return found

    names = tuple(f"trainer.objective.{field}" for field in fields)
    return Becomes(names, "how far a token's ratio may be from 1", how)


def of_advantages(field: str, name: str, value: Any) -> Answer:
    """Likewise of the advantages."""
    kinds = {
        kind.model_fields["name"].default: kind for kind in get_args(get_args(AnyAdvantages)[0])
    }
    if field not in kinds[name].model_fields:
        return Missing(f"the advantages {name} have no {field}: see docs/objectives.md")
    return {f"trainer.advantages.{field}": value}


def of_gae(
    advantages: Callable[[Source], str], field: str, unit: str, how: Callable[[Any], Any]
) -> Becomes:
    """What only gae has: λ, or a critic."""

    def answer(given: Given) -> Answer:
        if advantages(given.source) != "gae":
            return NoMeaning("only gae has it, and the advantages are others")
        return {field: how(given.value)}

    return Becomes((field,), unit, answer)


def frequency(field: str) -> Becomes:
    """How often something is done."""
    unit = "steps, of batches; below 1: never, 0 here"
    return is_field(field, unit, lambda steps: max(0, int(steps)))


def aggregation(length: str, *lengths: str) -> Becomes:
    """How tokens' losses are added up; the last kind divides by a length, the response's."""

    def how(given: Given) -> Answer:
        if given.value in AGGREGATIONS:
            return {"trainer.aggregation": AGGREGATIONS[given.value]}
        longest = given.source.count(length, *lengths, default=0)
        if given.value != "seq-mean-token-sum-norm" or not longest:
            return Missing(f"{given.value}: there are {', '.join(AGGREGATIONS.values())}")
        return {"trainer.aggregation": "fixed_length", "trainer.fixed_length": longest}

    return Becomes(("trainer.aggregation", "trainer.fixed_length"), "how losses are added up", how)


OF_TRAINER = ("trainer.ranks", "cluster.kind", "cluster.trainer.nodes", "cluster.trainer.gpus")
OF_WORKERS = (
    "engine.workers", "engine.colocated", "cluster.explorers.min", "cluster.explorers.gpus"
)  # fmt: skip
OF_GPUS = OF_TRAINER + OF_WORKERS


def placed(*, trainer: int, workers: int, per_node: int, per_worker: int, shared: bool) -> Answer:
    """Fields for so many GPUs of the trainer and of workers, on nodes of so many.

    `shared`: the workers' are the trainer's own.
    """
    found: dict[str, Any] = {"trainer.ranks": trainer}
    total = max(trainer, workers) if shared else trainer + workers
    if total <= per_node:
        found["engine.workers"] = max(1, workers // per_worker)
        return found | ({"engine.colocated": True} if shared else {})
    if shared:
        return Missing(
            f"workers on the trainer's own {total} GPUs are of one machine (engine.colocated): "
            f"split them (cluster.kind=ray, cluster.trainer.gpus, cluster.explorers.gpus)"
        )
    nodes = -(-trainer // per_node)
    of_explorer = max(per_worker, min(workers, per_node))
    return found | {
        "cluster.kind": "ray",
        "cluster.trainer.nodes": nodes,
        "cluster.trainer.gpus": trainer // nodes,
        "cluster.explorers.min": max(1, workers // of_explorer),
        "cluster.explorers.gpus": of_explorer,
        "engine.workers": max(1, of_explorer // per_worker),
    }


SEED = is_field("seed", "of tasks and sampling", int)
