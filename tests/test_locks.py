"""Locks between processes: who holds one is named, and one that is just being given up is waited for."""

import os
import threading
import time

import pytest

from triderm_dist.files import LOCK_SECONDS, exclusive_lock, lock_part, new_folder
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


def test_folder_for_unfinished_work_that_is_none_is_kept(tmp_path):
    part = tmp_path / "out.part"
    part.mkdir()
    (part / "notes.txt").write_text("mine")
    message = rf"{part}: is the name for unfinished work, and something else is there; move or delete it"
    for context in (lock_part(part, "in use"), new_folder(tmp_path / "out")):
        with pytest.raises(InputError, match=message), context:
            pass
    assert (part / "notes.txt").read_text() == "mine" and [path.name for path in part.iterdir()] == ["notes.txt"]
    (part / "notes.txt").rename(tmp_path / "file.part")
    for name in ("out", "new"):  # an empty folder, and none
        with new_folder(tmp_path / name) as folder:
            (folder / "a").touch()
            folder.rename(tmp_path / name)
    with pytest.raises(InputError, match="something else is there"), new_folder(tmp_path / "file"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.part", "new", "out"]


def test_folder_of_a_killed_process_is_emptied_and_that_of_a_live_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv(LOCK_SECONDS, "0")
    left = tmp_path / "out.part" / "new" / "half"
    left.mkdir(parents=True)
    (tmp_path / "out.part" / "lock").touch()
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out") as folder:
        assert not left.exists()
        with pytest.raises(Busy, match="another process writes out; wait for it or end it"):
            new_folder(tmp_path / "out").__enter__()
        (folder / "b").touch()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
