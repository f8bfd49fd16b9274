"""A study's report on a terminal: its cells with intervals, the paper's tables, comparisons, trials."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dashboards import aggregate, paper
from dashboards.aggregate import Findings, Grid
from dashboards.beside_paper import Beside, beside_paper, papers
from dashboards.comparison import Against, Compared, Setting
from dashboards.conclusions import conclude, interval
from dashboards.description import describe
from dashboards.formatting import label, p_value, percent, plain_table, shown
from dashboards.statistics import Summary
from dashboards.status import WIDE, heading
from dashboards.study_data import StudyData
from storage.text import printable

MOST_TRIALS = 60
STUDIED = ("Data", "Network")
"""Lines of the description that the page has in full."""
MOST_COMPARED = 20
"""Settings of each study in the table of a comparison."""


def report_text(data: StudyData, width: int = WIDE) -> RenderableType:
    """A study: the answer, what was studied, its tables, what was found.

    Args:
        width: of the terminal, in characters; columns that it has no room for are left out, costs first.
    """
    findings = aggregate.findings(data)
    said = conclude(data, findings)
    top = [said.answer, *(f"Warning: {warning}" for warning in said.warnings), "", *heading(data.status)]
    top += [f"{name.lower()} {value}" for name, value in describe(data) if name in STUDIED]
    parts: list[RenderableType] = [Text(printable("\n".join(top)))]
    ended = [len(cell.ended) for cell in findings.cells]
    if any(each > 1 for each in ended) or ("policy" in data.parameters and any(ended)):
        heads, lines = cells_table(data, findings)
        title, left = (SINGLES_TITLE, (len(heads) - 1,)) if findings.single else (CELLS_TITLE, ())
        parts.append(_fitted(title, heads, lines, width, folded=0, left=left))
    else:
        parts.append(_trials(data, width))
    if findings.comparisons:
        heads, lines = comparisons_table(findings)
        parts.append(_fitted(COMPARISONS_TITLE, heads, lines, width, folded=0, left=(len(heads) - 1,)))
    beside = beside_paper(data, findings)
    tables = [] if beside is None else beside.tables()
    parts += [plain_table(title, *table) for title, table in tables]
    grid = aggregate.grid(data)
    if grid is not None and grid.values and not tables:
        parts.append(_grid(grid))
    sentences = [*said.sentences, *paper_sentences(beside)]
    if sentences:
        parts.append(Text(printable("\n".join(["", *sentences]))))
    return Group(*parts)


DISPENSABLE = (
    "p Wilcoxon",
    "p t",
    "min. detectable",
    "different",
    "best at",
    "epochs",
    "images",
    "sd",
    "seconds",
    "% of full time",
    "may be best",
)
"""Columns that narrow terminals do not show, in the order in which they go."""
LEAST_FOLDED = 24
"""Characters of a column of settings, whose text continues in further lines."""


def _fitted(
    title: str, heads: list[str], lines: list[list[str]], width: int, *, folded: int, left: tuple[int, ...] = ()
) -> Table:
    """The table without the columns that the terminal has no room for, as far as they are dispensable."""
    kept = list(range(len(heads)))
    for name in DISPENSABLE:
        if _needed(heads, lines, kept, folded) <= width:
            break
        kept = [i for i in kept if heads[i] != name]
    places = {i: place for place, i in enumerate(kept)}
    return plain_table(
        title, [heads[i] for i in kept], [[line[i] for i in kept] for line in lines],
        left=tuple(places[i] for i in (folded, *left)), folded=(places[folded],), least=LEAST_FOLDED,
    )  # fmt: skip


def _needed(heads: list[str], lines: list[list[str]], kept: Iterable[int], folded: int | None = None) -> int:
    """Characters of a line of the table."""
    widths = {i: max(len(line[i]) for line in (heads, *lines)) for i in kept}
    if folded is not None:
        widths[folded] = min(widths[folded], LEAST_FOLDED)
    return 1 + sum(each + 2 for each in widths.values())


SINGLES_TITLE = "Settings, best first: single runs"
CELLS_TITLE = "Settings: mean (95 % interval over seeds and images), n: seeds, p: some pruned"
COMPARISONS_TITLE = "Comparisons in points, paired by seed; intervals and p of the whole table (Bonferroni)"


def paper_sentences(beside: Beside | None) -> list[str]:
    if beside is None:
        return []
    return [*beside.sentences, f"The paper's own numbers: {' '.join(paper.CAVEATS)}"]


def cells_table(data: StudyData, findings: Findings) -> tuple[list[str], list[list[str]]]:
    """Heads and lines: a cell a line, best first, costs as means over its seeds; whether it may be the best, where that
    is known. Where all are single runs, the trial and, in the last column, its state.
    """
    printed = {cell.label: papers(data, cell) for cell in findings.cells}
    with_test = any(cell.test for cell in findings.cells)
    heads = ["setting", *(["trial", "validation %"] if findings.single else ["n", "validation %", "sd"])]
    heads += [*(["test %"] if with_test else []), "images", "different", "seconds"]
    heads += ["% of full time"] if findings.ratios else []
    heads += ["paper %"] if any(printed.values()) else []
    heads += ["may be best"] if findings.candidates else []
    heads += ["state"] if findings.single else []
    lines = []
    for cell in findings.ranked:
        of, ratio, theirs = cell.accuracy, findings.ratios.get(cell.label), printed[cell.label]
        if findings.single:
            line = [cell.label, str(cell.ended[0].number), interval(of)]
        else:
            line = [cell.label, str(of.n) + (" p" if cell.pruned else ""), interval(of)]
            line.append("–" if of.sd is None else f"{100 * of.sd:.2f}")
        if with_test:
            line.append(interval(cell.test) if cell.test else "–")
        line += [f"{cell.mean('images'):,.0f}", f"{cell.mean('seen'):,.0f}", f"{cell.mean('seconds'):.1f}"]
        if findings.ratios:
            line.append(interval(ratio, digits=0) if ratio else "–")
        if any(printed.values()):
            line.append(f"{100 * theirs.accuracy:.1f}" if theirs else "–")
        if findings.candidates:
            line.append("yes" if cell in findings.candidates else "no" if cell.rows else "–")
        line += [cell.ended[0].state] if findings.single else []
        lines.append(line)
    return heads, lines


def comparisons_table(findings: Findings) -> tuple[list[str], list[list[str]]]:
    heads = ["settings", "n", "difference (95 %)", "p t", "p Wilcoxon", "p adjusted", "min. detectable", "finding"]
    lines = []
    for c in findings.comparisons:
        numbers = [_p(c.p_t), _p(c.p_wilcoxon), _p(c.p_adjusted)]
        least = "–" if c.detectable is None else f"{100 * c.detectable:.2f}"
        finding = c.finding + (", provisional" if c.provisional else "")
        lines.append([f"{c.a} – {c.b}", str(c.difference.n), interval(c.difference), *numbers, least, finding])
    return heads, lines


def _p(value: float | None) -> str:
    return "–" if value is None else p_value(value)


def comparison_text(compared: Compared, width: int = WIDE) -> RenderableType:
    """Several studies against the first: the answer, the settings, in what the studies differ.

    Args:
        width: of the terminal, in characters; below WIDE only the differences with their intervals are shown.
    """
    said = compared.said
    top = [said.answer, *(f"Warning: {warning}" for warning in said.warnings), ""]
    parts: list[RenderableType] = [Text(printable("\n".join(top)))]
    parts.append(plain_table(COMPARED_TITLE, *compared_table(compared, MOST_COMPARED), left=(0, 1), folded=(1,)))
    heads, lines = against_table(compared, MOST_COMPARED)
    if lines:
        if width < WIDE:
            heads, *lines = [[*line[:4], line[-1].removesuffix(", provisional")] for line in (heads, *lines)]
        parts.append(plain_table(AGAINST_TITLE, heads, lines, left=(0, 1, len(heads) - 1), folded=(0, 1)))
    if compared.differences:
        names = tuple(range(1, 1 + len(compared.studies)))
        parts.append(plain_table("Config: what differs", *differences_table(compared), left=(0,), folded=names))
    sentences = [*left_out(compared, MOST_COMPARED), *said.sentences]
    if sentences:
        parts.append(Text(printable("\n".join(["", *sentences]))))
    return Group(*parts)


COMPARED_TITLE = "Settings: mean (intervals over seeds and images hold together with 95 %), n: seeds, p: some pruned"
AGAINST_TITLE = "Settings against the first study's, in points; intervals and p of the whole table (Bonferroni)"


def compared_table(compared: Compared, most: int) -> tuple[list[str], list[list[str]]]:
    """Heads and lines.

    Args:
        most: settings of each study.
    """
    measure = "test" if compared.measure == "test" else "validation"
    lines = []
    for setting, _ in _most(compared, most):
        n = str(setting.mean.n) + (" p" if setting.cell.pruned else "")
        images = f"{setting.cell.mean('images'):,.0f}"
        lines.append([setting.study.name, _name(setting), n, interval(setting.mean), images])
    return ["study", "setting", "n", f"{measure} %", "images"], lines


def against_table(compared: Compared, most: int) -> tuple[list[str], list[list[str]]]:
    """As `compared_table`, of the settings that stand against one of the first study."""
    heads = ["setting", f"against {compared.studies[0].name}", "n", "difference (95 %)", "p adjusted"]
    heads += ["min. detectable", "finding"]
    lines = []
    for setting, against in _most(compared, most):
        if against is None:
            continue
        of = against.difference
        name = f"{setting.study.name}: {_name(setting)}" if len(compared.studies) > 2 else _name(setting)
        n = f"{of.n[0]} paired" if of.paired else f"{of.n[0]} and {of.n[1]}"
        spread = Summary(of.n[0], of.mean, low=against.low, high=against.high)
        least = "–" if against.detectable is None else f"{100 * against.detectable:.2f}"
        finding = against.finding + (", provisional" if against.provisional else "")
        lines.append([name, _reference(setting, against), n, interval(spread), _p(against.p_adjusted), least, finding])
    return heads, lines


def _reference(setting: Setting, against: Against) -> str:
    """Of one that matches what differs, of the best all that it is."""
    reference = against.reference
    if not against.matching:
        return f"best, {_name(reference)}"
    differs = {
        name: value for name, value in reference.parameters.items() if setting.parameters.get(name, value) != value
    }
    return label(differs) or "the same"


def left_out(compared: Compared, most: int) -> list[str]:
    """The sentence about settings that the tables do not show, if there are any."""
    notes = []
    for data in compared.studies:
        number = sum(setting.study is data for setting, _ in compared.settings)
        if number > most:
            notes.append(f"the best {most:,} of {number:,} settings of {data.name}")
    return [f"Shown are {', '.join(notes)}; --json FILE has all of them."] if notes else []


def _most(compared: Compared, most: int) -> list[tuple[Setting, Against | None]]:
    pairs = []
    for data in compared.studies:
        pairs += [pair for pair in compared.settings if pair[0].study is data][:most]
    return pairs


def _name(setting: Setting) -> str:
    return setting.label or setting.cell.policy


def differences_table(compared: Compared) -> tuple[list[str], list[list[str]]]:
    """Heads and lines: a setting of the config a line, a study a column."""
    heads = ["setting", *(data.name for data in compared.studies)]
    return heads, [[key, *values] for key, values in compared.differences]


def trials_table(data: StudyData) -> tuple[list[str], list[list[str]]]:
    """The heads and cells of the table of trials, best first; the state is the last column."""
    replicated = data.config.search.replicates > 1
    heads = ["trial", *data.parameters, *(["seed"] if replicated else [])]
    heads += ["accuracy", "best at", "epochs", "images", "seconds", "state"]
    lines = []
    for row in sorted(data.rows, key=lambda row: (row.value is None, -(row.value or 0.0), row.number)):
        chosen = [shown(row.parameters[name]) if name in row.parameters else "" for name in data.parameters]
        numbers = [percent(row.value), str(row.best_epoch or ""), str(row.epochs), f"{row.images:,}"]
        seed = [str(row.seed)] if replicated else []
        lines.append([str(row.number), *chosen, *seed, *numbers, f"{row.seconds:.1f}", row.state])
    return heads, lines


def _trials(data: StudyData, width: int) -> Table:
    heads, lines = trials_table(data)
    more = f" ({MOST_TRIALS} of {len(lines)})" if len(lines) > MOST_TRIALS else ""
    title, lines = f"Trials, best first{more}", lines[:MOST_TRIALS]
    if _needed(heads, lines, [i for i, head in enumerate(heads) if head not in DISPENSABLE]) > width:
        return _trials_by_setting(title, heads, lines, data.parameters, width)
    kept = list(range(len(heads)))
    for name in DISPENSABLE:
        if _needed(heads, lines, kept) > width:
            kept = [i for i in kept if heads[i] != name]
    heads, lines = [heads[i] for i in kept], [[line[i] for i in kept] for line in lines]
    return plain_table(title, heads, lines, left=(len(heads) - 1,))


def _trials_by_setting(
    title: str, heads: list[str], lines: list[list[str]], parameters: Sequence[str], width: int
) -> Table:
    """With all parameters of a trial in one column, for more of them than fit side by side."""
    end = 1 + len(parameters)
    settings = [
        ", ".join(f"{name} {value}" for name, value in zip(heads[1:end], line[1:end], strict=True) if value)
        for line in lines
    ]
    lines = [[line[0], setting, *line[end:]] for line, setting in zip(lines, settings, strict=True)]
    heads = ["trial", "setting", *heads[end:]]
    return _fitted(title, heads, lines, width, folded=1, left=(len(heads) - 1,))


def _grid(grid: Grid) -> Table:
    lines = []
    for alpha in grid.alphas:
        line = [f"{alpha:,}"]
        for beta in grid.betas:
            cell = grid.values.get((alpha, beta))
            line.append("–" if cell is None else f"{100 * cell.accuracy.mean:.2f}" + (" p" if cell.pruned else ""))
        lines.append(line)
    title = "Accuracy (%) by alpha, beta; p: pruned"
    return plain_table(title, ["alpha \\ beta", *(shown(beta) for beta in grid.betas)], lines)
