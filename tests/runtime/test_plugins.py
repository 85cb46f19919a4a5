"""Errors of plugins are explained in one line that names the plugin."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import HANG_SECONDS, ROOT
from triderm_dist.config import import_plugins
from triderm_dist.runtime.plugins import IMPORTED, explain_plugin_error

PLUGIN = """\
from abc import ABC, abstractmethod


class Mine:
    def step(self):
        return 1 / 0


class Unfinished(ABC):
    @abstractmethod
    def save(self): ...


def build(name):
    return {}[name]


TABLE = {"mine": Mine, "unfinished": Unfinished, "build": build}
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict]:
    """The name of the only plugin of this process, and its table."""
    for other in list(IMPORTED):
        monkeypatch.delitem(IMPORTED, other)
    path = tmp_path / "my_plugin.py"
    path.write_text(PLUGIN)
    import_plugins([str(path)])
    (module,) = (module for module, name in IMPORTED.items() if name == str(path))
    return str(path), sys.modules[module].TABLE


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda table: table["mine"]().step(), "line 6, in step: ZeroDivisionError: division by zero"),
        (lambda table: table["build"]("a"), "line 15, in build: KeyError: 'a'"),
        (lambda table: table["build"]("a", 3), "TypeError: build() takes 1 positional argument but 2 were given"),
        (lambda table: table["mine"]().step(3), "TypeError: Mine.step() takes 1 positional argument but 2 were given"),
        (lambda table: table["unfinished"](), "TypeError: Can't instantiate abstract class Unfinished"),
        (lambda table: table["mine"].title, "AttributeError: type object 'Mine' has no attribute 'title'"),
        (lambda table: table["mine"]().title, "AttributeError: 'Mine' object has no attribute 'title'"),
        (lambda table: 1 / 0, None),
        (lambda table: json.loads(3), None),
    ],
)
def test_errors_of_a_plugin_are_told_from_others(call, expected, plugin: tuple[str, dict]) -> None:
    name, table = plugin
    try:
        call(table)
    except Exception as error:
        line = explain_plugin_error(error)
        assert line == expected if expected is None else line is not None
        if line:
            assert line.startswith(name) and str(expected) in line and "\n" not in line
    else:
        raise AssertionError("no error")


def test_errors_in_modules_of_a_plugin_that_is_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in list(IMPORTED):
        monkeypatch.delitem(IMPORTED, other)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("from my_package.parts import Mine\n")
    (tmp_path / "my_package" / "parts.py").write_text("class Mine:\n    def step(self):\n        return 1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_plugins(["my_package"])
    mine = sys.modules["my_package"].Mine
    for call, expected in (
        (lambda: mine().step(), "my_package, parts.py, line 3, in step: ZeroDivisionError: division by zero"),
        (lambda: mine().title, "my_package: AttributeError: 'Mine' object has no attribute 'title'"),
    ):
        with pytest.raises((ArithmeticError, AttributeError)) as raised:
            call()
        assert explain_plugin_error(raised.value) == expected


def test_author_of_a_plugin_sees_the_traceback(plugin, monkeypatch, capsys) -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        plugin[1]["mine"]().step()
    for value, lines in (("0", 0), ("1", 1)):
        monkeypatch.setenv("TRIDERM_TRACEBACK", value)
        assert "line 6, in step: Zero" in str(explain_plugin_error(raised.value))
        assert capsys.readouterr().err.count("return 1 / 0") == lines


def test_error_of_a_plugin_ends_a_program_with_one_line(tmp_path: Path) -> None:
    plugin = "from triderm_dist.tasks import TASKS_OF_MINE\n"
    (tmp_path / "broken.py").write_text(plugin)
    (tmp_path / "raising.py").write_text(
        "from triderm_dist.data.readers.source import READERS, Reader\n"
        "READERS['mine'] = Reader(lambda *args: {}['a'], inputs=lambda source, task: [source])\n"
    )
    (tmp_path / "task.yaml").write_text(
        "{name: x, reader: mine, diagnoses: [{name: A}, {name: B}], views: [{name: clinical}], columns: {image: a}}"
    )
    for name, message in (("broken.py", "line 1: ImportError"), ("raising.py", "line 2, in <lambda>: KeyError: 'a'")):
        words = ["source=.", "output=out", "task=task.yaml", f"plugins=[{name}]"]
        done = subprocess.run(
            [sys.executable, "-m", "triderm_dist", "pack", *words], cwd=tmp_path, capture_output=True, text=True,
            timeout=HANG_SECONDS, env={"PYTHONPATH": str(ROOT), "PATH": ""},
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1 and f"{name}, {message}" in done.stderr, done.stderr
