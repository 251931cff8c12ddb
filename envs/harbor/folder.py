"""Task folders, of Harbor and of terminal-bench, as one kind of record.

    Harbor                         terminal-bench
    task.toml                      task.yaml
    instruction.md                     instruction: …
    environment/Dockerfile         Dockerfile, docker-compose.yaml
    tests/test.sh, …               run-tests.sh, tests/…
    solution/solve.sh              solution.sh

Harbor's own package reads its folders too. It wants Python 3.12, and 28 packages with it.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .dockerfile import Need, Recipe, reaches_out, read_dockerfile, root_folder

Marking = Literal["reward file", "pytest summary"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMG])", re.IGNORECASE)
_MB = {"K": 1 / 1024, "M": 1.0, "G": 1024.0}
_CANARY = re.compile(r"<!--.*canary.*-->|#.*canary.*", re.IGNORECASE)
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Megabytes = Annotated[int, Field(gt=0)]
_None = Annotated[list[Any], Field(max_length=0)]
_M = TypeVar("_M", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFolder:
    """One task.

    folder: where commands begin.
    tests: the folder of what the verifier finds in /tests, beside the script that is run there.
    needs: what a sandbox must have to offer, and which words ask for it.
    agent_s: for all of the agent's commands together; None: no limit.
    """

    name: str
    instruction: str
    recipe: Recipe
    folder: str
    env: Mapping[str, str]
    tests: Path
    script: Path
    verifier_env: Mapping[str, str] = field(default_factory=dict)
    marking: Marking
    needs: Mapping[Need, str]
    agent_s: float | None
    verifier_s: float
    build_s: float = 600.0
    memory_mb: int | None = None
    disk_mb: int | None = None


def is_task(path: Path) -> bool:
    return (path / "task.toml").exists() or (path / "task.yaml").exists()


def read_folder(path: Path) -> TaskFolder:
    """The task in that folder. ValueError says what is wrong with it, or can't be had here."""
    try:
        return _harbor(path) if (path / "task.toml").exists() else _terminal_bench(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"can't be read: {error}") from error


class _Section(BaseModel):
    """What asks for anything else can't be had here, and is refused by its name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    network_mode: Literal["public", "no-network", "allowlist"] | None = None
    allowed_hosts: list[str] | None = None


class _Agent(_Section):
    timeout_sec: _Seconds | None = None
    user: str | int | None = None


class _Verifier(_Section):
    timeout_sec: _Seconds = 600.0
    user: str | int | None = None
    env: dict[str, str] = {}
    environment_mode: Literal["shared"] | None = None


class _Environment(_Section):
    build_timeout_sec: _Seconds = 600.0
    docker_image: str | None = None
    workdir: str | None = None
    env: dict[str, str] = {}
    memory_mb: _Megabytes | None = None
    storage_mb: _Megabytes | None = None
    memory: str | None = None
    storage: str | None = None
    cpus: float | None = None
    gpus: Literal[0] | None = None
    gpu_types: list[str] | None = None
    os: Literal["linux"] = "linux"
    allow_internet: bool | None = None
    mcp_servers: _None = []


class _TaskToml(BaseModel):
    """The sections that say how it is played; the others tell about it."""

    model_config = ConfigDict(strict=True)

    agent: _Agent = _Agent()
    verifier: _Verifier = _Verifier()
    environment: _Environment = _Environment()
    steps: _None = []


class _TaskYaml(BaseModel):
    model_config = ConfigDict(strict=True)

    instruction: str
    parser_name: Literal["pytest"] = "pytest"
    max_agent_timeout_sec: _Seconds = 360.0
    max_test_timeout_sec: _Seconds = 60.0
    run_tests_in_same_shell: Literal[False] = False


def _harbor(path: Path) -> TaskFolder:
    try:
        about = _checked(_TaskToml, tomllib.loads((path / "task.toml").read_text()), "task.toml")
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"task.toml is no TOML: {error}") from error
    environment, verifier, context = about.environment, about.verifier, path / "environment"
    for key, env in (("environment.env", environment.env), ("verifier.env", verifier.env)):
        if "${" in "".join(env.values()):
            raise ValueError(f"{key} takes ${{…}} from this machine's environment: write the value")
    if any(context.glob("*compose.y*ml")):
        raise ValueError("environment/ has a compose file: there are no services here")
    needs: dict[Need, str] = {}
    if environment.docker_image is not None:
        needs["image"] = f"docker_image = {environment.docker_image!r}"
    recipe = Recipe()
    if environment.docker_image is None or (context / "Dockerfile").exists():
        recipe = read_dockerfile(context / "Dockerfile", context)
    for section in (about.agent, verifier):
        if section.user not in (None, "root", 0):
            needs["user"] = f"user = {section.user!r}"
    if "allowlist" in (environment.network_mode, about.agent.network_mode, verifier.network_mode):
        needs["network"] = "network_mode = 'allowlist'"
    folder = environment.workdir or recipe.folder
    root_folder(folder)
    tests = path / "tests"
    script = tests / "test.sh"
    _ask_of_script(script, needs)
    return TaskFolder(
        name=path.name,
        instruction=_without_canary((path / "instruction.md").read_text()),
        recipe=recipe,
        folder=folder,
        env={**recipe.env, **environment.env},
        tests=tests,
        script=script,
        verifier_env=verifier.env,
        marking="reward file",
        needs={**recipe.needs, **needs},
        agent_s=about.agent.timeout_sec,
        verifier_s=verifier.timeout_sec,
        build_s=environment.build_timeout_sec,
        memory_mb=environment.memory_mb or _megabytes("memory", environment.memory),
        disk_mb=environment.storage_mb or _megabytes("storage", environment.storage),
    )


def _terminal_bench(path: Path) -> TaskFolder:
    try:
        about = _checked(_TaskYaml, yaml.safe_load((path / "task.yaml").read_text()), "task.yaml")
        compose = path / "docker-compose.yaml"
        if compose.exists():
            _check_compose(yaml.safe_load(compose.read_text()))
    except yaml.YAMLError as error:
        raise ValueError(f"task.yaml or docker-compose.yaml is no YAML: {error}") from error
    recipe = read_dockerfile(path / "Dockerfile", path)
    needs: dict[Need, str] = {}
    script = path / "run-tests.sh"
    _ask_of_script(script, needs)
    return TaskFolder(
        name=path.name,
        instruction=about.instruction,
        recipe=recipe,
        folder=recipe.folder,
        env={"TEST_DIR": "/tests", **recipe.env},
        tests=path / "tests",
        script=script,
        marking="pytest summary",
        needs={**recipe.needs, **needs},
        agent_s=about.max_agent_timeout_sec,
        verifier_s=about.max_test_timeout_sec,
    )


def _check_compose(given: Any) -> None:
    """ValueError unless it is the one container that every such task has."""
    services = given.get("services") if isinstance(given, dict) else None
    if not isinstance(services, dict) or list(services) != ["client"]:
        named = ", ".join(map(str, services)) if isinstance(services, dict) else "none"
        raise ValueError(f"docker-compose.yaml has services ({named}): only 'client' is had here")


def _checked(model: type[_M], given: Any, name: str) -> _M:
    try:
        return model.model_validate(given)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(map(str, wrong["loc"]))
        what = "is not to be had here" if wrong["type"] == "extra_forbidden" else wrong["msg"]
        raise ValueError(f"{name}: {key}={wrong['input']!r}: {what}") from error


def _ask_of_script(script: Path, needs: dict[Need, str]) -> None:
    if out := reaches_out(script.read_text()):
        needs["network"] = f"{script.name}: {out}"


def _megabytes(key: str, size: str | None) -> int | None:
    if size is None:
        return None
    found = _SIZE.fullmatch(size.strip())
    if found is None:
        raise ValueError(f"task.toml: environment.{key}={size!r} must be like 2G or 512M")
    return max(1, int(float(found[1]) * _MB[found[2].upper()]))


def _without_canary(text: str) -> str:
    """Data sets are marked by such lines at the top, against being trained on unawares."""
    lines = text.splitlines()
    while lines and (not lines[0].strip() or _CANARY.fullmatch(lines[0].strip())):
        del lines[0]
    return "\n".join(lines)
