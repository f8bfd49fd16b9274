"""Text that leaves the program: without control characters, and commands quoted as a shell takes them."""

from __future__ import annotations

import re
import shlex
import unicodedata


def printable(text: str) -> str:
    """`text` with its control characters (ESC, BEL, bidirectional overrides, …) as escapes such as \\x1b.

    Names, errors and paths come from databases and files that others wrote: on a terminal they must not do anything.
    Line breaks and tabs stay.
    """
    if text.isprintable():  # most text; keeps long tables fast
        return text
    return "".join(
        _escaped(c) if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t" else c for c in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", errors="surrogatepass").decode("ascii")


def one_line(text: str) -> str:
    """`text` on one line, printable."""
    return printable(" ".join(text.split()))


def without_passwords(text: str) -> str:
    """Whatever a text may repeat of a URL with a password; `storage.url.redact` is for URLs that are known to be ones.

    In front of a host all up to the last @ goes: a password may have one that should have been written as %40.
    """
    text = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"(?i)(pass(?:word|wd|file)?=)[^&\s]*", r"\1***", text)


def command(*words: str, storage: str | None = None) -> str:
    """A command of ours as it can be typed into a shell.

    Args:
        storage: a URL for `--storage`, as it may be shown; None: the command finds the storage by itself.
    """
    options = [] if storage is None else ["--storage", storage]
    return shlex.join(("study", *words, *options))
