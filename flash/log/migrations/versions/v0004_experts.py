"""Which experts tokens were routed to, in mixtures of experts."""

import sqlalchemy as sa
from alembic import op

from flash.log.columns import Experts

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Of what there is nobody knows."""
    for table in ("completions", "sequences"):
        op.add_column(table, sa.Column("experts", Experts))
