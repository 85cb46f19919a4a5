"""README and docs: links, anchors, navigation, names of files and modules. Nothing is built: `make docs` does that."""

import re
import unicodedata
from pathlib import Path

import pytest
import yaml

from tests.test_architecture import LAYERS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
REPOSITORY_PATH = re.compile(
    r"`((?:triderm_dist|tests|benchmarks|launch|tune|accelerate_configs|docs|\.ci|\.github)/[\w./-]*)`"
)
MODULE = re.compile(r"\b(triderm_dist(?:\.\w+)+)")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    """The text of a page without its code blocks."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"^    .*$", "", text, flags=re.M)


def anchors_of(path: Path) -> list[str]:
    """The anchors of a page's headings, as Python-Markdown makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(path), flags=re.M)
    plain = [unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode() for heading in headings]
    return [re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in plain]


def pages_in(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages_in(entry)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_links_and_anchors_exist(path):
    root = DOCS if path.is_relative_to(DOCS) else ROOT  # the site holds docs/ only
    for link in LINK.findall(text_of(path)):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_file() and target.is_relative_to(root), link
        assert not anchor or anchor in anchors_of(target), link


# The headings of the changelog repeat for each version; nothing links to them.
@pytest.mark.parametrize("path", [file for file in FILES if file.name != "CHANGELOG.md"], ids=name_of)
def test_heading_anchors_are_equal_on_github_and_the_site(path):
    anchors = anchors_of(path)
    assert len(set(anchors)) == len(anchors)
    for heading in re.findall(r"^#+ (.+)$", text_of(path), flags=re.M):
        on_github = re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-")
        assert on_github in anchors, heading


def test_every_page_is_in_the_navigation():
    nav = pages_in(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == [path.relative_to(DOCS).as_posix() for path in PAGES]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_lines_are_short(path):
    long = [line for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 120]
    assert not long


@pytest.mark.parametrize("path", [file for file in FILES if file.name != "CHANGELOG.md"], ids=name_of)
def test_referenced_files_and_modules_exist(path):
    text = path.read_text(encoding="utf-8")
    for name in REPOSITORY_PATH.findall(text):
        placeholder = re.search(r"NAME|DATE", name)
        assert placeholder or (ROOT / name).exists(), name
    for dotted in MODULE.findall(text):
        assert dotted.endswith("NAME") or exists(dotted), dotted


def test_documented_layers_equal_the_enforced_ones():
    rows = "\n".join(", ".join(layer) for layer in LAYERS)
    assert f"\n{rows}\n" in (DOCS / "architecture.md").read_text(encoding="utf-8")


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module, or a name that occurs in one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:end])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if file.is_file():
            rest = parts[end:]
            return not rest or bool(re.search(rf"\b{rest[0]}\b", file.read_text("utf-8")))
    return False
