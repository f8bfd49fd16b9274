"""Which names a study may have."""

from __future__ import annotations

import unicodedata

from storage.errors import UserError
from storage.schema import STUDIES

MOST_CHARACTERS: int = STUDIES.c.study_name.type.length  # type: ignore[attr-defined]
"""Optuna's column has no room for more, and only PostgreSQL says so."""


def check_study_name(name: str) -> None:
    """Raises:
    UserError: a name that the database cannot hold, a command line cannot pass on, or a terminal cannot show.
    """
    fault = None
    if not name.strip():
        fault = "it is empty"
    elif name.startswith("-"):
        fault = "it begins with a dash, as options do"
    elif len(name) > MOST_CHARACTERS:
        fault = f"it has {len(name):,} characters"
    elif any(unicodedata.category(character) == "Cs" for character in name):
        fault = "it is not UTF-8"
    elif any(unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") for character in name):
        fault = "it has control characters"
    if fault is not None:
        raise UserError(
            f"the name of a study is 1 to {MOST_CHARACTERS} visible characters and does not begin with a dash; "
            f"got {name[:40]!a}{'…' if len(name) > 40 else ''}: {fault}; choose another --name"
        )
