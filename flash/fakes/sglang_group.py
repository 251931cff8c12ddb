"""How a fake SGLang server gets weights from a group of torch's: in earnest.

It joins and receives as SGLang 0.5.23 does on a CPU, over gloo, with a thread in the place of each
of its ranks
(srt/managers/scheduler_components/weight_updater.py,
srt/model_executor/model_runner_components/weight_updater.py).
"""

import asyncio
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec

_PATIENCE = timedelta(seconds=60)


class InitGroup(msgspec.Struct, forbid_unknown_fields=True):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = "weight_update_group"
    backend: str = "nccl"


class DestroyGroup(msgspec.Struct, forbid_unknown_fields=True):
    group_name: str = "weight_update_group"


class Begin(msgspec.Struct, forbid_unknown_fields=True):
    """It may say which models of a server; ours have one."""


class Distributed(msgspec.Struct, forbid_unknown_fields=True):
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str = "weight_update_group"
    flush_cache: bool = True
    load_format: str | None = None


class End(msgspec.Struct, forbid_unknown_fields=True):
    """Nothing can be said with it."""


class Refused(Exception):
    """What the server answers in place of having done it."""


class Ranks:
    """The ranks of a server, with what they receive. Methods raise Refused as SGLang refuses.

    Args:
        size: of tensor parallelism.

    Updates are counted over all of its life: that of number `fails_in_update` fails, and that of
    `hangs_in_update` never ends.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.updates = 0
        self.fails_in_update = self.hangs_in_update = -1
        self.hangs = asyncio.Event()  # is set once it does
        self.restart()

    def restart(self) -> None:
        """In no group, and without a session of updates."""
        self._groups: dict[str, list[Any]] = {}
        self._received: dict[str, Any] | None = None  # of the session that is open

    async def init(self, asked: InitGroup) -> None:
        try:
            joining = [
                asyncio.to_thread(_join, asked, asked.rank_offset + rank)
                for rank in range(self.size)
            ]
            self._groups[asked.group_name] = await asyncio.gather(*joining)
        except (RuntimeError, ValueError) as error:
            raise Refused(f"Failed to initialize custom process group: {error}.") from error

    def destroy(self, asked: DestroyGroup) -> None:
        if asked.group_name not in self._groups:
            raise Refused("The group to be destroyed does not exist.")
        del self._groups[asked.group_name]

    def begin(self) -> None:
        if self._received is not None:
            raise Refused("a weight-update session is already open; call end_weight_update() first")
        self._received = {}

    async def receive(self, asked: Distributed) -> None:
        if self._received is None:
            raise Refused(
                "update_weights_from_distributed must run between begin_weight_update() and "
                "end_weight_update()"
            )
        self.updates += 1
        if self.updates == self.fails_in_update:
            raise Refused("Failed to update parameter online: out of memory")
        if self.updates == self.hangs_in_update:
            self.hangs.set()
            await asyncio.Event().wait()
        try:
            ranks = self._groups[asked.group_name]
            parts = await asyncio.gather(*(asyncio.to_thread(_receive, r, asked) for r in ranks))
        except (KeyError, RuntimeError) as error:
            raise Refused(f"Failed to receive weights: {error}") from error
        for received in parts:
            self._received |= received

    def end(self, folder: Path) -> None:
        """All that came is in the folder then."""
        from safetensors.torch import save_file  # noqa: PLC0415  # nobody else needs torch here

        if self._received is None:
            raise Refused("no weight-update session is open; call begin_weight_update() first")
        save_file(self._received, folder / "model.safetensors")
        self._received = None


def _join(asked: InitGroup, rank: int) -> Any:
    """Under the keys that torch gives to a group which is made beside others."""
    import torch.distributed  # noqa: PLC0415

    dist: Any = torch.distributed
    if asked.backend != "gloo":
        raise ValueError(f"no {asked.backend} without a GPU")
    store = dist.TCPStore(
        asked.master_address, asked.master_port, asked.world_size, False, _PATIENCE
    )
    for prefix in (asked.group_name, f"{asked.group_name}/", "cpu/"):
        store = dist.PrefixStore(prefix, store)
    return dist.ProcessGroupGloo(store, rank, asked.world_size, _PATIENCE)


def _receive(group: Any, asked: Distributed) -> dict[str, Any]:
    """The tensors of one broadcast, or of as many as there are tensors."""
    import torch  # noqa: PLC0415

    kinds = [getattr(torch, dtype) for dtype in asked.dtypes]
    sizes = [
        math.prod(shape) * kind.itemsize for shape, kind in zip(asked.shapes, kinds, strict=True)
    ]
    assert asked.load_format == "flattened_bucket"
    bucket = torch.empty(sum(sizes), dtype=torch.uint8)
    group.broadcast(bucket, 0).wait()
    return {
        name: part.view(kind).reshape(shape).clone()
        for name, part, kind, shape in zip(
            asked.names, torch.split(bucket, sizes), kinds, asked.shapes, strict=True
        )
    }
