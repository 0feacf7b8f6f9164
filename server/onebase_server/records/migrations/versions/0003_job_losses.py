"""how often a job's process was lost since its last checkpoint"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("saved_step", sa.BigInteger(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("losses", sa.BigInteger(), server_default="0", nullable=False))


def downgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_column("losses")
        batch_op.drop_column("saved_step")
