"""Which GPUs a run's workers have."""

from collections.abc import Sequence

from flash.system.machine import Gpu


def worker_gpus(present: Sequence[Gpu], ranks: int, *, shared: bool = False) -> Sequence[Gpu]:
    """The GPUs that the trainer's ranks leave to the workers; all of them if they leave none. Or
    those that the ranks share with them."""
    return present[:ranks] if shared else present[ranks:] or present


def check_parallel(tensor_parallel: int, devices: Sequence[Gpu]) -> None:
    """ValueError if a server takes more GPUs than there are for all of them."""
    if devices and tensor_parallel > len(devices):
        raise ValueError(
            f"engine.tensor_parallel={tensor_parallel} exceeds the {len(devices)} GPUs that the "
            f"servers may use ({', '.join(map(str, devices))}): use fewer, or name more in "
            f"engine.devices"
        )


def gpus_of(devices: Sequence[Gpu], number: int, each: int = 1) -> tuple[Gpu, ...]:
    """Those of worker `number`, if every worker has `each` of the devices, in turn."""
    return tuple(devices[(number * each + n) % len(devices)] for n in range(each) if devices)


def visible_gpus(devices: Sequence[Gpu], number: int, each: int = 1) -> dict[str, str]:
    """What worker `number` sees of the GPUs, as a variable of its environment."""
    if not devices:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus_of(devices, number, each)))}
