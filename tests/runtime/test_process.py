"""Standard streams that are closed, a home that is missing, a limit on open files."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import HANG_SECONDS, ROOT
from triderm_dist.runtime import process


class Failing(io.StringIO):
    """A stream that can't be written to."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ECONNRESET])
def test_closed_output_does_not_end_the_work(number, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Failing(number))
    with process.tolerate_closed_output():
        print("a line", flush=True)


def test_full_disk_behind_a_stream_is_named(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Failing(errno.ENOSPC))
    with pytest.raises(OSError, match=r"No space left on device: 'standard output'"), process.tolerate_closed_output():
        print("a line")


@pytest.mark.parametrize(
    ("words", "redirection", "status"),
    [
        ("--help", "| true", 0),
        ("train --help-all", "| head -1 | grep -q Train", 0),
        ("config list", ">&-", 0),
        ("train output=", "<&- >&- 2>&-", 2),
        ("train --help-all", "> /dev/full", 2),
    ],
)
def test_programs_with_closed_streams(words, redirection, status):
    script = f"set -o pipefail; {sys.executable} -m triderm_dist {words} {redirection}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    expected = "error: standard output: No space left on device\n" if "full" in redirection else ""
    assert (done.returncode, done.stderr) == (status, expected)


def test_a_closed_stream_whose_number_a_library_has_taken():
    """libffi, for one, opens a file for reading when ctypes is imported, and keeps it."""
    script = """
import os, sys
os.open(os.devnull, os.O_RDONLY)
from triderm_dist.runtime.process import open_missing_streams
open_missing_streams()
print("text", flush=True)
"""
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c '{script}' >&-"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_missing_home_becomes_a_temporary_folder(tmp_path, monkeypatch, capsys):
    import pwd

    def unknown(number: int) -> None:
        raise KeyError

    monkeypatch.setattr(process.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    (tmp_path / "file").touch()
    for home in (None, "", str(tmp_path / "file" / "home")):
        for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
            monkeypatch.delenv(name, raising=False)
        if home is not None:
            monkeypatch.setenv("HOME", home)
        process.provide_home()
        assert Path.home().parent == tmp_path and Path.home().stat().st_mode & 0o777 == 0o700
        assert os.environ["USER"] == f"uid-{os.getuid()}"
        assert "Set HOME to keep them" in capsys.readouterr().err
    Path.home().rmdir()
    Path.home().touch()  # by another user
    monkeypatch.setenv("HOME", "")
    process.provide_home()
    assert Path.home().is_dir() and "Set HOME to keep them" in capsys.readouterr().err
    monkeypatch.setattr(process.tempfile, "gettempdir", lambda: str(tmp_path / "absent"))
    monkeypatch.setenv("HOME", "")
    process.provide_home()
    assert not os.environ["HOME"] and "nor can a temporary folder" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path / "not" / "made"))
    process.provide_home()
    assert Path.home() == tmp_path / "not" / "made" and not capsys.readouterr().err
