"""Pages of the site that are made from the code, so that they cannot go stale: settings, API, changelog.

MkDocs calls `on_config`, `on_files` and `on_page_markdown` (mkdocs.yml, `hooks`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "triderm_dist"
COPIED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that are files of the repository's root."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the generated pages to the navigation."""
    (reference,) = (entry["Reference"] for entry in config.nav if "Reference" in entry)
    reference.append({"API": [{title: path} for title, path in api_pages()]})
    config.nav += [{"Contributing": "contributing.md"}, {"Changelog": "changelog.md"}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages themselves."""
    for title, path in api_pages():
        files.append(File.generated(config, path, content=api_page(title)))
    for path, source in COPIED.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        for page, file in COPIED.items():
            text = text.replace(f"]({file})", f"]({page})")
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the tables of settings."""
    return re.sub(r"<!-- settings: ([\w.]+):(\w+) -->", lambda found: settings_of(*found.groups()), markdown)


def api_pages() -> list[tuple[str, str]]:
    """(package, page) of the library's root and of each of its packages."""
    packages = sorted(path.parent for path in LIBRARY.rglob("__init__.py"))
    names = [".".join(("triderm_dist", *package.relative_to(LIBRARY).parts)) for package in packages]
    return [(name, f"reference/api/{name.removeprefix('triderm_dist.')}.md") for name in names]


def api_page(package: str) -> str:
    """A page that lists the modules of one package for mkdocstrings."""
    folder = ROOT.joinpath(*package.split("."))
    modules = [package, *(f"{package}.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem[0] != "_")]
    sections = (f"::: {module}\n    options: {{heading_level: 2}}\n" for module in modules)
    return "\n".join((f"# {package}\n", *sections))


def settings_of(module: str, name: str) -> str:
    """The settings of one class as a definition list, a heading for each section."""
    import importlib

    from triderm_dist.config import describe

    kind = getattr(importlib.import_module(module), name)
    inherited = set() if name == "Experiment" else inherited_keys(kind)
    return "\n".join(lines_of([row for row in describe(kind) if row[0] not in inherited]))


def inherited_keys(kind: type) -> set[str]:
    from triderm_dist.config import Experiment, describe

    return {row[0] for row in describe(Experiment)} if issubclass(kind, Experiment) else set()


def lines_of(rows: list[Any]) -> Iterator[str]:
    above = ""
    # Plain keys first: Markdown has no way to end a section.
    for key, type_name, default, description in sorted(rows, key=lambda row: "." in row[0]):
        section = key.rpartition(".")[0]
        if section != above:
            above = section
            yield f"\n### `{section}`\n" if section else ""
        yield f"`{key}`\n:   {description}.  \n    {type_name}, default `{default}`\n"
