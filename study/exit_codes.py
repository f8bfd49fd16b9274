"""All exit codes of the command `study`."""

from __future__ import annotations

BAD_INPUT = 2
"""A worker's exit code when the input is bad, as its last line says."""


INTERRUPTED = 130
"""A worker's exit code when it was asked to stop."""


DATABASE_UNAVAILABLE = 75
"""A worker's exit code when the database was away for too long."""
