"""Where environments of verifiers are played in tests, and one of them: `verifiers_lamps/`."""

from pathlib import Path

from tests import venvs


def python() -> str:
    """A Python that has verifiers and vf-lamps."""
    package = Path(__file__).parent / "verifiers_lamps"
    return str(venvs.python("verifiers", "verifiers==0.3.1", beside=["--editable", package]))
