"""What a checkpoint is made of, and whether one is whole; imports no torch.

model/         a Hugging Face model, with its tokenizer if it has one
optimizer.pt   what the optimizer has gathered, its steps so far, random numbers
critic.pt      of advantages=gae: the critic and its optimizer
trainer.json   the policy version, and the size of every file; written last
"""

import json
from pathlib import Path

MODEL_FOLDER = "model"
OPTIMIZER_FILE = "optimizer.pt"
CRITIC_FILE = "critic.pt"
STATE_FILE = "trainer.json"


def write_state(directory: Path, version: int) -> None:
    """Declare the checkpoint in `directory` whole."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(directory)): path.stat().st_size for path in files}
    state = {"policy_version": version, "files": sizes}
    (directory / STATE_FILE).write_text(json.dumps(state, indent=1))


def checkpoint_version(directory: Path) -> int:
    """The policy version of a checkpoint; ValueError if it is none, or not whole."""
    remedy = "resume from another folder under runs/<name>/checkpoints"
    try:
        state = json.loads((directory / STATE_FILE).read_text())
        version, sizes = int(state["policy_version"]), dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{directory} is not a checkpoint, or not a whole one ({STATE_FILE}: {error}): {remedy}"
        ) from error
    for name, size in sizes.items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state_of = "missing" if found is None else f"{found} bytes long instead of {size}"
            raise ValueError(
                f"the checkpoint {directory} is damaged ({name} is {state_of}): {remedy}"
            )
    return version
