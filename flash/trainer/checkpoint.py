"""What a checkpoint is made of, and whether one is whole; imports no torch.

policy/        weights, what the optimizer has gathered, its steps so far, each rank's shards
critic/        of advantages=gae: the critic's, likewise
model/         what a Hugging Face model has beside its weights: config.json, how to generate, the
               tokenizer; with trainer.lora the adapters, in PEFT's format, which policy/ lacks then
trainer.json   the policy version, and of every file its size and a sum over its ends; written
               once the disk has the others
"""

import os
import zlib
from pathlib import Path

import msgspec

from flash.system.durable import sync, write_whole

MODEL_FOLDER = "model"
ADAPTERS_FILE = "adapter_model.safetensors"  # in it, in the place of weights
POLICY_FOLDER = "policy"
CRITIC_FOLDER = "critic"
STATE_FILE = "trainer.json"

# Of versions that had the weights in model/: gathered on one rank, or each rank's shards.
_OLD_OPTIMIZER = ("optimizer.pt", "optimizer/")

# At each end of a file: where its format keeps the table of what is in it. A sum over all of a
# large model would take as long as its writing.
_END_BYTES = 1 << 20


class _File(msgspec.Struct, frozen=True):
    bytes: int
    sum_of_ends: int


class _State(msgspec.Struct, frozen=True):
    policy_version: int
    files: dict[str, _File]


def forget_state(directory: Path) -> None:
    """What is in `directory` is not whole any more."""
    (directory / STATE_FILE).unlink(missing_ok=True)


def write_state(directory: Path, version: int) -> None:
    """Declare the checkpoint in `directory` whole, also if another was there before."""
    forget_state(directory)
    paths = sorted(directory.rglob("*"))
    sync(*paths, directory)
    files = {str(p.relative_to(directory)): _seen(p) for p in paths if p.is_file()}
    state = _State(policy_version=version, files=files)
    write_whole(directory / STATE_FILE, msgspec.json.format(msgspec.json.encode(state)))


def checkpoint_version(directory: Path) -> int:
    """The policy version of a checkpoint; ValueError if it is none, or not whole."""
    remedy = "take another folder under runs/<name>/checkpoints"
    try:
        state = msgspec.json.decode((directory / STATE_FILE).read_bytes(), type=_State)
    except (OSError, ValueError) as error:  # a file that is no JSON, or of another kind, is both
        raise ValueError(
            f"{directory} is not a checkpoint, or not a whole one ({STATE_FILE}: {error}): {remedy}"
        ) from error
    if old := next((name for name in state.files if name.startswith(_OLD_OPTIMIZER)), ""):
        its_model = f"of its {MODEL_FOLDER}/ folder"
        if f"{MODEL_FOLDER}/{ADAPTERS_FILE}" in state.files:
            its_model = f"of what PEFT's merge_and_unload makes {its_model}"
        raise ValueError(
            f"the checkpoint {directory} is of an earlier version ({old}): start anew under "
            f"another name, with --model {its_model}"
        )
    for name, saved in state.files.items():
        if damage := _damage(directory / name, saved):
            raise ValueError(f"the checkpoint {directory} is damaged ({name} {damage}): {remedy}")
    return state.policy_version


def _damage(path: Path, saved: _File) -> str:
    """What is wrong with a file; nothing if it is as it was saved."""
    try:
        found = _seen(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"can't be read: {error.strerror}"
    if found.bytes != saved.bytes:
        return f"is {found.bytes} bytes long instead of {saved.bytes}"
    return "" if found == saved else "has other content than was saved"


def _seen(path: Path) -> _File:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        ends = zlib.crc32(file.read(_END_BYTES))
        file.seek(max(file.tell(), size - _END_BYTES))
        return _File(bytes=size, sum_of_ends=zlib.crc32(file.read(), ends))
