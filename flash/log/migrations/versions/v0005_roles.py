"""Who said what in an episode that several play, and what that was worth."""

import sqlalchemy as sa
from alembic import op

from flash.log.columns import Json, Words

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """What there is was said by one."""
    op.add_column("episodes", sa.Column("role_rewards", Json))
    op.add_column("sequences", sa.Column("role", Words, nullable=False, server_default=""))
