"""What each role of a run on a cluster is started with."""

import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from pydantic import BaseModel, SecretStr

from flash.cluster.place import Place
from flash.config import Config
from flash.explorer.address import Address
from flash.section import revealed

_SECRET = "FLASH_CLUSTER_SECRET_"  # and a number
_TOKEN = "FLASH_CLUSTER_TOKEN"
_HOSTS = "FLASH_CLUSTER_HOSTS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that a role needs on a node that knows nothing of the run.

    `settings` hold no key, but names of variables, which `variables` has. `marker` is a file that
    begins empty and then tells the run's folder: a node that does not see it does not share the
    disk.
    """

    settings: dict[str, Any]
    variables: dict[str, str]
    cwd: str
    marker: str
    workers: int
    ca: str | None
    gpus: dict[str, int]  # by role
    hosts: int  # environment hosts and reward processes of each explorer, on nodes that have room


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Of a run: where explorers come in, and its folder."""

    address: Address
    folder: str


class HostsAsked(msgspec.Struct, frozen=True):
    """The environment hosts and reward processes that an explorer's process has on other nodes of a
    cluster: how many, with how many cores each. `runtime_env` is as Ray has it, and may hold keys.
    """

    address: str
    namespace: str
    runtime_env: str
    cpus: int
    count: int

    @property
    def variables(self) -> dict[str, str]:
        return {_HOSTS: msgspec.json.encode(self).decode()}

    @classmethod
    def told(cls) -> "HostsAsked | None":
        """By the variables of this process, which has them no more then."""
        told = os.environ.pop(_HOSTS, "")
        return msgspec.json.decode(told, type=cls) if told else None


def plan_of(config: Config, *, token: str, marker: Path) -> Plan:
    """The plan of a configuration whose kind of cluster is not none."""
    variables = {_TOKEN: revealed(config.explorers.token) or token}
    for entry in (*config.agent.env, *(of for server in config.agent.mcp for of in server.env)):
        if "=" not in entry:
            variables[entry] = os.environ[entry]
    settings = _named(config, variables)
    asked = config.cluster
    settings |= {
        "runs_dir": str(config.runs_dir.resolve()),
        "cluster": {"kind": "none"},
        "engine": settings["engine"] | {"workers": 0, "devices": []},
        "explorers": settings["explorers"]
        | {"expected": asked.explorers.most, "token": f"${_TOKEN}"},
    }
    if asked.trainer.gpus:
        settings["trainer"] |= {"ranks": asked.trainer.nodes * asked.trainer.gpus}
    return Plan(
        settings=settings,
        variables=variables,
        cwd=os.getcwd(),
        marker=str(marker),
        workers=config.engine.workers or 1,
        ca=str(config.explorers.certificate.resolve()) if config.explorers.certificate else None,
        gpus={"controller": asked.trainer.gpus, "explorer": asked.explorers.gpus},
        hosts=config.hosted if asked.hosts.cpus else 0,
    )


def controller_settings(plan: Plan, *, host: str, folder: Path | None) -> dict[str, Any]:
    """Of the controller where explorers come in at `host`; it goes on with the run in `folder`."""
    settings = plan.settings | {"explorers": plan.settings["explorers"] | {"host": host}}
    if folder is not None:
        settings |= {
            "name": folder.name,
            "checkpoint": plan.settings["checkpoint"] | {"resume": True},
        }
    return settings


def controller_command(settings_file: Path, plan: Plan, others: Sequence[str] = ()) -> list[str]:
    """`others`: the cluster's address, the namespace, and the names there of what has the ranks of
    further nodes."""
    words = [str(settings_file), plan.marker, *others]
    return [sys.executable, "-m", "flash.cluster", "train", *words]


def explorer_command(plan: Plan, place: Place, folder: Path) -> list[str]:
    """`folder` has explorers.json, and is its own. It relays weights, but for a run with TLS. It
    waits for the controller however long that is away: its role ends it with the run."""
    command = [sys.executable, "-m", "flash.cluster", "explore", str(folder), "--name", place.role]
    command += ["--folder", str(folder), "--wait_s", "inf", f"--engine.workers={plan.workers}"]
    if place.gpus:
        command.append(f"--engine.devices={','.join(map(str, place.gpus))}")
    command += ["--relay", place.address] if plan.ca is None else ["--ca", plan.ca]
    return command


def environment(plan: Plan, role: str) -> dict[str, str]:
    """The variables of a role's process. Without GPUs of its own it sees none."""
    variables = {**os.environ, **plan.variables, "PYTHONUNBUFFERED": "1"}
    if not plan.gpus[role]:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def working_directory(plan: Plan) -> str | None:
    """The one in which `flash train` was called, where a node has it."""
    return plan.cwd if Path(plan.cwd).is_dir() else None


def folder_of_node(what: str, of: str) -> Path:
    """For what is not on a disk that nodes share: the same again for the same."""
    parent = Path(tempfile.gettempdir()) / f"flash-{what}-{os.getuid()}"
    parent.mkdir(exist_ok=True, mode=0o700)
    if parent.stat().st_uid != os.getuid():
        raise PermissionError(f"{parent} is another user's: remove it, or set $TMPDIR")
    return parent / hashlib.sha256(of.encode()).hexdigest()[:16]


def _named(section: BaseModel, variables: dict[str, str]) -> dict[str, Any]:
    """Its values, in which each key is the name of a variable; these are added to `variables`."""
    values: dict[str, Any] = section.model_dump(mode="json")
    for name in values:
        part = getattr(section, name)
        if isinstance(part, BaseModel):
            values[name] = _named(part, variables)
        elif isinstance(part, SecretStr) and (key := part.get_secret_value()):
            variable = key[1:] if key.startswith("$") else f"{_SECRET}{len(variables)}"
            variables[variable] = revealed(part)
            values[name] = f"${variable}"
    return values


def written(settings: Mapping[str, Any], file: Path) -> Path:
    """As YAML, for its owner alone."""
    import yaml  # noqa: PLC0415  (only a role writes one)

    file.touch(mode=0o600)
    file.write_text(yaml.safe_dump(dict(settings), sort_keys=False))
    return file
