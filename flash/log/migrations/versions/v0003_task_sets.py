"""Which task set a group and an episode are of."""

import sqlalchemy as sa
from alembic import op

from flash.log.columns import Words

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """What there is was of none."""
    for table in ("groups", "episodes"):
        op.add_column(table, sa.Column("task_set", Words, nullable=False, server_default=""))
