"""Damaged YAML: experiments, tasks, search spaces and launcher files are refused in one line, or read."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from tests.fuzz.checks import cases, fuzz, result_or_refusal
from tests.fuzz.mutations import DEEP, ODD_TEXT, edited_bytes, edited_tree
from triderm_dist.config import Experiment, as_yaml, load
from triderm_dist.doctor.launcher import read_launcher
from triderm_dist.schema import Task
from triderm_dist.search.space import read_space
from triderm_dist.tasks import load_task

ROOT = Path(__file__).parents[2]
ANCHORS = "".join(f"a{n}: &a{n} [{', '.join(f'*a{n - 1}' for _ in range(10)) if n else '1, 2'}]\n" for n in range(9))
TEXTS = (
    *(
        "",
        "---\n---\n",
        "%YAML 9.9\n---\n",
        "[1, 2]",
        "3",
        "- a\n- b",
        "\t",
        "a: b: c",
        "a: [",
        "{",
        "'",
        "!!python/none",
    ),
    *("? [a]\n: b", "? {a: b}\n: c", "null: 1", "1: 2", "1.5: 2", "true: 3", "<<: 3", "<<: {a: 1}", "a: &a [*a]", "-"),
    *("a: &a {b: *a}", "base: .", "base: [x]", "base: experiment.yaml", "base: missing.yaml", "base: 3", 'base: "\\0"'),
    *("plugins: 3", "plugins: [3]", "plugins: {a: b}", "a: !!binary x", "a: !!python/object/apply:os.system [ls]"),
    *("a: !!timestamp 2020-13-45", "a: !!int x", "a: !!float x", "a: !!set {a, b}", "a: 2024-02-30", "a: 0o9", "a: 0x"),
    *("a: 1_000", f"a: {'9' * 5000}", "a: 1e999", f"a: {DEEP}", f"a: {'{a: ' * 3000}", ANCHORS, "# only a comment"),
    *('a: "\\ud800"', 'a: "\\x00"', 'a: "\\q"', "a: |\n  b\n c", "\ufeffa: 1", "a: 1\r\nb: 2", "\x00", "a: \x1b[31m"),
    *("a: *missing", "a: &x", "&x a: 1", "models: {..: {}}", "models: {a/b: {}}", "models: {'': {}}", "models: [a]"),
    *(
        "models: 3",
        "models: {a: {train: 3}}",
        "data: {folds: 1e400}",
        "train: {lr: .nan}",
        "train: {optim: {lr: .inf}}",
    ),
    *("train: {epochs: 99999999999999999999}", "!!python/none"),
)
"""What YAML allows, and what its readers trip over."""


@functools.cache
def _tree(text: str) -> Any:
    return yaml.safe_load(text)


@st.composite
def edited_yaml(draw: st.DrawFn, text: str) -> bytes:
    """Damage the tree of a YAML file, a line or its bytes; or add one of `TEXTS`."""
    kind = draw(st.sampled_from(("tree", "tree", "tree", "bytes", "lines", "text", "added", "encode")))
    lines = text.splitlines(keepends=True)
    if kind == "tree":
        tree = draw(edited_tree(_tree(text), odd=ODD))
        return yaml.safe_dump(tree, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if kind == "bytes":
        return draw(edited_bytes(text.encode()))
    if kind == "encode":
        return text.encode(draw(st.sampled_from(("utf-16", "utf-8-sig", "utf-32", "utf-16-le"))))
    if kind == "lines":
        at, to = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        lines.insert(to, draw(st.sampled_from(("", "  ", "\t", "- "))) + lines[at])
        return "".join(lines).encode()
    other = draw(st.sampled_from(TEXTS))
    return (f"{text}\n{other}\n" if kind == "added" else other).encode()


ODD = (*ODD_TEXT, None, True, 0, -1, 2**63, 1.5, float("nan"), float("inf"), [], {}, [None], {"a": 1}, [[1]], 10**400)


def check_files(name: str, text: str, read: Any, folder: Path, cases: int) -> None:
    path = folder / name

    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        result_or_refusal(lambda: read(path))

    fuzz(check, edited_yaml(text), cases)


def resolve(path: Path) -> None:
    """Read an experiment, and write and read its resolved settings, which must be the same."""
    experiment = load(Experiment, path)
    resolved = path.with_name("resolved.yaml")
    resolved.write_text(as_yaml(experiment), encoding="utf-8")
    assert load(Experiment, resolved) == experiment


@cases(4, 130)
@pytest.mark.parametrize("resolved", [False, True])
def test_damaged_experiment_is_refused_or_read(tmp_path: Path, resolved: bool, cases: int) -> None:
    """Damage a shipped experiment, and the file that a run saves, which has every setting."""
    path = ROOT / "launch/experiments/rtx4090.yaml"
    text = as_yaml(load(Experiment, path)) if resolved else path.read_text()
    check_files("experiment.yaml", text, resolve, tmp_path, cases)


@cases(3, 120)
@pytest.mark.parametrize("name", ["derm7pt", "pad_ufes_20"])
def test_damaged_task_is_refused_or_read(tmp_path: Path, name: str, cases: int) -> None:
    text = (ROOT / f"triderm_dist/tasks/{name}.yaml").read_text()

    def read(path: Path) -> None:
        task = load_task(path)
        assert Task.from_mapping(task.to_mapping(), "") == task

    check_files("task.yaml", text, read, tmp_path, cases)


@cases(3, 80)
def test_damaged_space_is_refused_or_read(tmp_path: Path, cases: int) -> None:
    text = next(iter(sorted((ROOT / "tune/spaces").glob("*.yaml")))).read_text()
    check_files("space.yaml", text, read_space, tmp_path, cases)


@cases(2, 60)
def test_damaged_launcher_file(tmp_path: Path, cases: int) -> None:
    text = (ROOT / "accelerate_configs/fsdp2.yaml").read_text()
    check_files("launcher.yaml", text, read_launcher, tmp_path, cases)
