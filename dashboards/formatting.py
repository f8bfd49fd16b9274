"""How values and tables are written, wherever people read them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from storage.text import printable


def shown(value: Any) -> str:
    """A parameter as people write it: 0.1, not 0.1000; 15,000."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def budget_lines(budgets: dict[str, float], spent: dict[str, float]) -> list[str]:
    return [
        f"spent {spent[unit]:,.4g} of {limit:,.4g} {unit}, {max(0.0, limit - spent[unit]):,.4g} left"
        for unit, limit in budgets.items()
    ]


def label(parameters: dict[str, Any]) -> str:
    """`dynamic, alpha 5,000, beta 0.7`: a policy speaks for itself."""
    return ", ".join(
        shown(value) if name == "policy" else f"{name} {shown(value)}" for name, value in parameters.items()
    )


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def process_of(owner: str) -> str:
    """`host:pid` of the `host:pid:token` that a worker goes by in the database."""
    return ":".join(owner.split(":")[:2])


def plain_table(
    title: str,
    heads: list[str],
    lines: list[list[str]],
    left: tuple[int, ...] = (),
    folded: tuple[int, ...] = (),
    least: int = 0,
) -> Table:
    """Args:
    left: columns of text.
    folded: columns whose cells go on in a further line where the terminal is too narrow; others are cut.
    least: characters of a folded column at least, where its text is as long.
    """
    table = Table(
        title=Text(printable(title)) if title else None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for i, head in enumerate(heads):
        longest = max([len(head), *(len(line[i]) for line in lines)])
        table.add_column(
            Text(printable(head)), justify="left" if i in left else "right", no_wrap=i not in folded,
            min_width=min(least, longest) if i in folded and least else None,
        )  # fmt: skip
    for line in lines:
        table.add_row(*(Text(printable(cell)) for cell in line))
    return table


def p_value(p: float) -> str:
    """With three digits: one that is below 5 % must not read 0.05."""
    return f"{p:.3g}"


def points(fraction: float) -> str:
    """A difference of accuracies: `1 point`, `0.52 points`."""
    text = f"{100 * fraction:.2f}"
    text = text.rstrip("0").rstrip(".") if text.endswith("0") else text
    return f"{text} {'point' if text == '1' else 'points'}"


def count(number: int, noun: str) -> str:
    """`1 seed`, `12 seeds`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def moment(at: float | None, pattern: str = "%Y-%m-%d %H:%M UTC") -> str:
    """Seconds since 1970, of which a database may hold any number, as a date and time; a dash for none."""
    try:
        return "–" if at is None else datetime.fromtimestamp(at, UTC).strftime(pattern)
    except (ValueError, OverflowError, OSError, TypeError):
        return "at an unknown time"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: `1:02:03`."""
    try:
        return str(timedelta(seconds=round(seconds)))
    except (ValueError, OverflowError, TypeError):
        return "unknown"
