"""The first schema; it has nothing to change."""

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Nothing."""
