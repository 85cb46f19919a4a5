"""Pages of the site that are made from the code, so that they cannot go stale: settings, API, changelog.

MkDocs calls `on_config`, `on_files` and `on_page_markdown` (mkdocs.yml, `hooks`).
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from triderm_dist.commands import names
from triderm_dist.config import Experiment
from triderm_dist.settings import Section, describe

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "triderm_dist"
COPIED = {"contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that are files of the repository's root."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the generated pages to the navigation."""
    sections = {title: pages for entry in config.nav for title, pages in entry.items()}
    sections["Reference"].append({"API": [{title: path} for title, path in api_pages()]})
    sections["Code"] += [{name.removesuffix(".md").capitalize(): name} for name in COPIED]
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
    """Fill in the settings of an experiment, and those that single programs add to it."""
    if page.file.src_uri != "reference/settings.md":
        return markdown
    markdown = markdown.replace("<!-- settings: experiment -->", experiment_settings())
    return markdown.replace("<!-- settings: programs -->", program_settings())


def api_pages() -> list[tuple[str, str]]:
    """(package, page) of the library's root and of each of its packages."""
    packages = sorted(path.parent for path in LIBRARY.rglob("__init__.py"))
    names = [".".join(("triderm_dist", *package.relative_to(LIBRARY).parts)) for package in packages]
    return [(name, f"reference/api/{name.removeprefix('triderm_dist.')}.md") for name in names]


def api_page(package: str) -> str:
    """A page that lists the modules of one package for mkdocstrings."""
    folder = ROOT.joinpath(*package.split("."))
    sections = {f"{package}.{path.stem}": "" for path in sorted(folder.glob("*.py")) if path.stem[0] != "_"}
    if (folder / "__init__.py").stat().st_size:
        # What it takes from its modules is on the page with them.
        own = ", ".join(defined_names(folder / "__init__.py"))
        sections = {package: f", members: [{own}]" if own else ", members: false", **sections}
    entries = (f"::: {module}\n    options: {{heading_level: 2{more}}}\n" for module, more in sections.items())
    return "\n".join((f"# {package}\n", *entries))


def defined_names(file: Path) -> list[str]:
    """Return the public names that a module defines itself."""
    found = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in found if not name.startswith("_")]


def experiment_settings() -> str:
    """The settings tree of a run, a heading for each section; models.NAME.train has the keys of train."""
    sections: dict[str, list[str]] = {"": []}  # plain keys first: Markdown has no way to end a section
    for row in describe(Experiment):
        section = row[0].rpartition(".")[0]
        if not section.startswith("models.NAME.train"):
            sections.setdefault(section, []).append(definition(*row))
    return "\n".join(
        line for section, rows in sections.items() for line in (f"\n### `{section}`\n" if section else "", *rows)
    )


def program_settings() -> str:
    """The settings of each program that are not those of an experiment."""
    shared = {row[0] for row in describe(Experiment)}
    lines = []
    for name in names():
        if kind := kind_of(name):
            rows = [row for row in describe(kind) if row[0] not in shared or not issubclass(kind, Experiment)]
            lines += [f"\n### `triderm {name}`\n", *(definition(*row) for row in rows)] if rows else []
    return "\n".join(lines)


def kind_of(program: str) -> type[Section] | None:
    """The settings class that a program hands to `cli.run`; None where it reads no settings."""
    module = importlib.import_module(f"triderm_dist.commands.{program}")
    found: list[type[Section]] = []
    if not hasattr(module, "run"):
        return None
    run, module.run = module.run, lambda kind, *rest, **options: found.append(kind)
    try:
        module.start()
    finally:
        module.run = run
    return found[0]


def definition(key: str, type_name: str, default: str, description: str) -> str:
    return f"`{key}`\n:   {description}.  \n    {type_name}, default `{default}`\n"
