"""What deploy/ starts."""

from pathlib import Path

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"


def entrypoint() -> str:
    """The command of the RayJob."""
    return yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())["spec"]["entrypoint"]
