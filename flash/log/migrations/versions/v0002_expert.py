"""What an expert wrote, and which batches imitated it."""

import sqlalchemy as sa
from alembic import op

from flash.log.columns import Array, Words

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Two tables, and the weight in the batches."""
    op.add_column("batches", sa.Column("expert_weight", sa.Float(53)))
    op.create_table(
        "expert",
        sa.Column("run", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("digest", sa.String(32), primary_key=True),
        sa.Column("source", Words, nullable=False),
        sa.Column("token_ids", Array("<i4"), nullable=False),
        sa.Column("loss_mask", Array("<f4"), nullable=False),
    )
    op.create_table(
        "expert_samples",
        sa.Column("run", sa.Integer, primary_key=True, autoincrement=False),
        *(
            sa.Column(name, sa.BigInteger, primary_key=True, autoincrement=False)
            for name in ("version", "part", "position")
        ),
        sa.Column("digest", sa.String(32), nullable=False),
    )
