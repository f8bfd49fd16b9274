"""The documentation: generated pages are current, links lead somewhere, commands exist, one word for one thing."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.e2e.test_readme import Line, check_command, lines_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OTHERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
ALL = [*OTHERS, *PAGES]

OLD_WORDS = (
    r"la(?:y|id|ying) (?:it |them |the study )?down|tickets?|settled?|go(?:es|ing|ne)? on with|giv(?:e|es|ing|en) "
    r"(?:\w+ )?(?:\w+ )?back|scribes?|crews?|fleets?|aside|guards?|riddles?|winner's curse|four times in five|"
    r"at it for|(?:is|was|are|were) (?:told|away)|nobody|stop watch|could show"
)
"""What design.md's table of words replaces."""
QUOTED = {
    "CHANGELOG.md": ("tickets",),
}
"""Keys, headings and stored values of the product itself, by the page that explains them."""


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATED = _generator().pages()


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_current(name: str) -> None:
    stored = (DOCS / "reference" / name).read_text(encoding="utf-8")
    assert stored == GENERATED[name], "run: python docs/generate.py"


def test_every_setting_has_a_meaning() -> None:
    rows = [line.split(" | ") for line in GENERATED["configuration.md"].splitlines() if line.startswith("| `")]
    assert rows
    assert [row[0] for row in rows if not row[1].strip()] == []


@pytest.mark.parametrize("page", ALL, ids=[str(page.relative_to(ROOT)) for page in ALL])
def test_one_word_for_one_thing(page: Path) -> None:
    allowed = QUOTED.get(str(page.relative_to(ROOT)), ())
    words = re.findall(rf"\b(?:{OLD_WORDS})\b", page.read_text(encoding="utf-8"), flags=re.IGNORECASE)
    assert [word for word in words if word not in allowed] == []


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings can be linked by, as Python-Markdown makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    plain = [
        re.sub(r"[^\w\s-]", "", heading.encode("ascii", "ignore").decode()).strip().lower() for heading in headings
    ]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", ALL, ids=[str(page.relative_to(ROOT)) for page in ALL])
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, fragment = target.partition("#")
        if re.match(r"https?://|mailto:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (fragment and fragment not in anchors(file)):
            broken.append(target)
        if DOCS in page.parents and path and DOCS not in file.parents:
            broken.append(f"{target} is outside of docs/, so not on the site")
    assert broken == []


COMMANDS = [
    (page, line)
    for page in ALL
    for line in lines_of(re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
    if line.command.startswith("study ") and "…" not in line.command
]


@pytest.mark.parametrize(
    ("page", "line"), COMMANDS, ids=[f"{page.relative_to(ROOT)}: {line.command}" for page, line in COMMANDS]
)
def test_commands_exist(page: Path, line: Line) -> None:
    check_command(line.command)


def test_every_page_is_in_the_menu() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = re.findall(r"[\w/-]+\.md", str(menu))
    assert sorted(listed) == [str(page.relative_to(DOCS)) for page in PAGES]


def test_the_site_loads_nothing_from_elsewhere() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert site["strict"] is True
    assert site["theme"]["font"] is False
    assert not {"extra_javascript", "extra_css"} & site.keys()
    # The theme fetches mermaid from another host as soon as a page has such a block.
    assert [page for page in PAGES if "```mermaid" in page.read_text()] == []


def test_nothing_is_left_to_fill() -> None:
    for page in ALL:
        assert not re.search(r"TO-FILL|TODO|TO-BE", page.read_text(encoding="utf-8")), page
