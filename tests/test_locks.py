"""Locks between processes: who holds one is named, and one that is just being given up is waited for."""

import os
import threading
import time

import pytest

from triderm_dist.files import LOCK_SECONDS, exclusive_lock
from triderm_dist.schema import Busy, InputError


def test_lock_names_its_holder_and_is_waited_for(tmp_path, monkeypatch, capsys):
    lock, held, free = tmp_path / "folder" / ".lock", threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive_lock(lock, "held"):
            held.set()
            free.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    me = rf"in use \(PID {os.getpid()} on \S+, since 20\d\d-\S+ \S+ UTC"
    with pytest.raises(Busy, match=rf"{me}\)$"), exclusive_lock(lock, "in use"):
        pass
    monkeypatch.setenv(LOCK_SECONDS, "0.1")
    with pytest.raises(Busy, match=rf"{me}; waited 0.1 s\)$"), exclusive_lock(lock, "in use"):
        pass
    monkeypatch.setenv(LOCK_SECONDS, "600")
    threading.Timer(0.1, free.set).start()
    with exclusive_lock(lock, "in use"):
        assert lock.read_text().startswith(f"{os.getpid()} ")
    holder.join()
    assert "; waiting at most 600 s" in capsys.readouterr().out and not lock.read_text()


def test_holder_that_has_ended_is_told_apart(tmp_path):
    lock = tmp_path / ".lock"
    with exclusive_lock(lock, ""):
        text = lock.read_text()
        lock.write_text(text.replace(str(os.getpid()), "4194305", 1))  # above the largest PID
        with pytest.raises(Busy, match="a process that PID 4194305 started, which has ended, on "):
            exclusive_lock(lock, "in use").__enter__()
        lock.write_bytes(b"\xff\0 what")
        with pytest.raises(Busy, match=r"in use \(another process\)"):
            exclusive_lock(lock, "in use").__enter__()


def test_lock_in_a_folder_that_its_holder_removed_is_made_again(tmp_path, monkeypatch):
    lock, held = tmp_path / "part" / "lock", threading.Event()
    monkeypatch.setenv(LOCK_SECONDS, "600")

    def pack() -> None:
        with exclusive_lock(lock, ""):
            held.set()
            time.sleep(0.2)
            lock.unlink()
            lock.parent.rmdir()

    holder = threading.Thread(target=pack)
    holder.start()
    held.wait()
    with exclusive_lock(lock, ""):
        assert lock.exists()
    holder.join()


def test_seconds_that_are_no_number_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(LOCK_SECONDS, "long")
    with pytest.raises(InputError, match="TRIDERM_LOCK_SECONDS=long: not a number"):
        exclusive_lock(tmp_path / "lock", "").__enter__()
