"""triderm clean: only what predicting, stacking and reporting do not read is removed."""

import subprocess
import sys

import pytest

from tests.processes import HANG_SECONDS, ROOT
from triderm_dist import cli
from triderm_dist.commands import clean
from triderm_dist.engine.clean import find_removable, remove, size_of
from triderm_dist.files import exclusive_lock
from triderm_dist.schema import Busy, DataError

KEPT = (
    *("config.yaml", "ensemble.json", "oof.parquet", "shards/train/index.json", "towers/a.safetensors"),
    *("tri/fold-0/weights.safetensors", "tri/fold-0/fold.json", "tri/fold-0/test.parquet", "tri/fold-0/metrics.jsonl"),
    *("tri/fold-1/checkpoints/epoch-1/state.json", "refit/tri/weights.safetensors", "refit/tri/fold.json"),
)
REMOVED = (
    *("tri/fold-0/checkpoints/epoch-1/state.json", "tri/fold-0/checkpoints/epoch-2/state.json"),
    *("refit/tri/checkpoints/epoch-1/state.json", "tri/other-settings/fold-0-abc/fold.json"),
    *("tokens/abc/plain-0.tokens", "tri/fold-0/weights.safetensors.12.part"),
)


@pytest.fixture
def run(tmp_path):
    for name in (*KEPT, *REMOVED):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(bytes(1000))
    return tmp_path / "run"


def files_of(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_what_the_run_needs_stays(run):
    parts, notes = find_removable(run)
    assert sum(part.size for part in parts) == 1000 * len(REMOVED) and size_of(run) == 1000 * len(KEPT + REMOVED)
    assert notes == ["kept: the checkpoints of tri/fold-1, which can be resumed"]
    remove(run, parts)
    assert {name for name in files_of(run) if ".lock" not in name} == set(KEPT)
    assert find_removable(run)[0] == []


def test_tokens_stay_where_the_run_lacks_the_tower(run):
    (run / "towers" / "a.safetensors").unlink()
    parts, notes = find_removable(run)
    remove(run, parts)
    assert (run / "tokens" / "abc" / "plain-0.tokens").exists() and any("tokens/" in note for note in notes)


def test_linked_folders_stay(run, tmp_path):
    (run / "tokens").rename(tmp_path / "shared")
    (run / "tokens").symlink_to(tmp_path / "shared")
    remove(run, find_removable(run)[0])
    assert (run / "tokens" / "abc" / "plain-0.tokens").exists()


@pytest.mark.parametrize("lock", [".lock", "tri/.fold-1.lock", "refit/.tri.lock"])
def test_run_in_use_is_refused(run, lock):
    before = files_of(run)
    with exclusive_lock(run / lock, "locked"), pytest.raises(Busy, match="a program works in this run"):
        remove(run, find_removable(run)[0])
    assert files_of(run) - {".lock"} >= before - {".lock"}


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "tri" / "fold-0").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no run"):
        find_removable(tmp_path)


def test_nothing_is_removed_without_an_answer(run):
    words = [sys.executable, "-m", "triderm_dist", "clean", str(run)]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=HANG_SECONDS, check=True
    )
    assert "6.0 kB  of 18.0 kB in" in done.stdout and "nothing was removed; add yes=true" in done.stdout
    assert set(KEPT + REMOVED) <= files_of(run)


@pytest.mark.parametrize(("answer", "removed"), [("y", True), ("n", False), ("", False)])
def test_answer_on_the_terminal_decides(run, answer, removed, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    cli.run(clean.CleanRun, clean.main, None, [str(run)], first="run")
    assert (run / REMOVED[0]).exists() is not removed
    assert ("removed 6.0 kB" in capsys.readouterr().out) is removed
