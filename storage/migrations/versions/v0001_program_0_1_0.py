"""The tables as version 0.1.0 of the program made them; that program wrote no version, so nothing is to be done."""

from __future__ import annotations

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Nothing."""
