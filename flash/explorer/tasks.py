"""Task sets that an explorer brings: a file of its own, with what their tasks are played with.

web: {env: {name: "my_web:Pages", options: {site: shop}}, agent: {max_turns: 8}}
"""

from collections.abc import Mapping
from pathlib import Path

from flash.config import try_environment, validated
from flash.config.names import check_names
from flash.config.source import read_mapping
from flash.config.task_sets import PlayedWith, TaskSetConfig

_EXAMPLE = "NAME: {env: …}, with the name of a task set of the run"


def read_tasks(path: Path) -> dict[str, PlayedWith]:
    """The task sets of that file, by name; each environment was made once, to see that it can be.

    ValueError names what is wrong in it.
    """
    sets = read_mapping(path, _EXAMPLE)
    if not sets or any(name in PlayedWith.model_fields for name in sets):
        raise ValueError(f"{path} must hold task sets by their names: {_EXAMPLE}")
    check_names(sets, f"{path}: ")
    return {name: _read(path, name, given) for name, given in sets.items()}


def _read(path: Path, name: str, given: object) -> PlayedWith:
    if not isinstance(given, Mapping):
        raise ValueError(f"{path}: {name}={given!r}: must be a mapping, as in {name}: {{env: …}}")
    for field in TaskSetConfig.model_fields:
        if field in given and field not in PlayedWith.model_fields:
            raise ValueError(
                f"{path}: {name}.{field}={given[field]!r} is the run's to say, for all who bring "
                f"{name}: set task_sets.{name}.{field} there"
            )
    try:
        of_set = validated(PlayedWith, given)
        if of_set.env is not None:
            try_environment(of_set.env)
    except ValueError as error:
        lines = [f"{path}: {name}.{line}" for line in str(error).split("\n")]
        raise ValueError("\n".join(lines)) from error
    return of_set
