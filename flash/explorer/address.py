"""Where a run's explorers come in: a file in its folder, which only its owner can read."""

from pathlib import Path
from typing import Self

import msgspec

from flash.explorer.messages import UNREADABLE
from flash.section import is_url

ADDRESS_FILE = "explorers.json"


class Address(msgspec.Struct, frozen=True):
    """A controller's URL, and the token of its run."""

    url: str
    token: str

    @classmethod
    def read(cls, run: Path) -> Self | None:
        """None if the run has not told yet. ValueError for a file that says something else."""
        path = run / ADDRESS_FILE
        try:
            address = msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError:
            return None
        except (OSError, *UNREADABLE) as error:
            raise ValueError(f"{path} can't be read: {error}") from error
        if not is_url(address.url):
            raise ValueError(f"{path}: url={address.url!r} is none: remove that file")
        return address

    @staticmethod
    def remove(run: Path) -> None:
        """Nobody comes in there any more: who did finds the folder without it."""
        (run / ADDRESS_FILE).unlink(missing_ok=True)

    def write(self, run: Path) -> None:
        """Whole, in the place of what was there."""
        partial = run / f".{ADDRESS_FILE}.partial"
        partial.unlink(missing_ok=True)
        partial.touch(mode=0o600)
        partial.write_bytes(msgspec.json.encode(self))
        partial.replace(run / ADDRESS_FILE)
