"""Where the roles of a run on a cluster are: a line each, and a file in the run's folder."""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from flash.system.durable import write_whole
from flash.system.machine import Gpu

PLACEMENT_FILE = "placement.json"


class Place(msgspec.Struct, frozen=True):
    """Where a role is, in which process, and with what."""

    role: str
    node: str
    host: str
    address: str
    pid: int
    cpus: int
    gpus: tuple[Gpu, ...]

    def __str__(self) -> str:
        cores = f"{self.cpus} core{'' if self.cpus == 1 else 's'}"
        gpus = f", GPU {', '.join(map(str, self.gpus))}" if self.gpus else ""
        return f"{self.role}: node {self.node} on {self.host} ({self.address}), {cores}{gpus}"


def write_places(run: Path, places: Iterable[Place]) -> None:
    """Whole, in the place of what was there."""
    ordered = sorted(places, key=lambda place: place.role)
    write_whole(run / PLACEMENT_FILE, msgspec.json.format(msgspec.json.encode(ordered)) + b"\n")


def read_places(run: Path) -> list[Place]:
    """None of a run that is on no cluster. ValueError for a file that says something else."""
    path = run / PLACEMENT_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Place])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"{path} can't be read: {error}: remove it") from error
