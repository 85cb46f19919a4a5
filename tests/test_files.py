"""Atomic writes: one temporary file per writer, modes, names in errors, and what killed writers leave."""

import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from triderm_dist import files
from triderm_dist.checksums import write_checked_json, write_checked_parquet, write_checked_tensors
from triderm_dist.data.shards.tar_writer import TarWriter
from triderm_dist.data.token_cache import TokenCache
from triderm_dist.files import (
    PATIENT_DATA,
    atomic_path,
    copy_file,
    dead_parts,
    file_sha256,
    naming_file,
    open_new,
    remove_dead_parts,
    size_text,
    write_tensors,
    write_text,
)
from triderm_dist.inference.slim_run import write_zip
from triderm_dist.submission import write_numbers


@pytest.fixture
def umask():
    """Set the umask, and restore it after the test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_writers_with_one_process_id_write_different_files(tmp_path, monkeypatch):
    """As in two containers, where both are process 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path / "table.json"
    with atomic_path(path) as first, atomic_path(path) as second:
        assert first != second and first.parent == second.parent == tmp_path
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["table.json"]


def test_temporary_name_is_never_that_of_another_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "urandom", bytes)
    with atomic_path(tmp_path / "a") as part:
        second = atomic_path(tmp_path / "a")
        with pytest.raises(FileExistsError, match="a"):
            second.__enter__()
        assert part.exists()


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o640), (0o077, 0o600), (0o002, 0o640)])
def test_patient_data_is_not_for_everybody(tmp_path, umask, mask, mode):
    umask(mask)
    write_text(tmp_path / "a.csv", "lesion_id\n", PATIENT_DATA)
    open_new(tmp_path / "a.tar", PATIENT_DATA).close()
    assert mode_of(tmp_path / "a.csv") == mode_of(tmp_path / "a.tar") == mode


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_weights_have_the_mode_of_new_files(tmp_path, umask, mask, mode):
    umask(mask)
    write_tensors(tmp_path / "a.safetensors", {"weight": torch.ones(2)})
    with atomic_path(tmp_path / "b.safetensors") as part:
        write_tensors(part, {"weight": torch.ones(2)})
    write_checked_tensors(tmp_path / "c.safetensors", {"mean": np.ones(2)})
    assert {mode_of(path) for path in tmp_path.iterdir()} == {mode}


def test_tensors_are_the_bytes_of_safetensors_own_writer(tmp_path):
    generator = torch.Generator().manual_seed(0)
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
    tensors = {
        f"{name}/{str(kind)[6:]}": (100 * torch.rand(shape, generator=generator)).to(kind)
        for kind in kinds
        for name, shape in (("head.weight", (3, 5)), ("größe", ()), ("none", (0, 2)))
    }
    tensors["channels last"] = torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    digest = write_tensors(tmp_path / "a.safetensors", tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert digest == file_sha256(tmp_path / "a.safetensors")
    write_tensors(tmp_path / "a.safetensors", {})
    assert load_file(tmp_path / "a.safetensors") == {}
    with pytest.raises(ValueError, match=r"a.safetensors: w is torch.complex64, which safetensors cannot hold"):
        write_tensors(tmp_path / "a.safetensors", {"w": torch.zeros(1, dtype=torch.complex64)})


def test_parts_of_killed_writers_are_removed_and_of_living_ones_kept(tmp_path):
    write_text(tmp_path / "a.json", "")
    for name in ("a.json.host-12-0123abcd.part", "b.npy.4711.part", "notes.part"):
        (tmp_path / name).write_text("")
    with atomic_path(tmp_path / "c.json") as living:
        assert [path.name for path in dead_parts(tmp_path)] == ["a.json.host-12-0123abcd.part", "b.npy.4711.part"]
        remove_dead_parts(tmp_path, tmp_path / "absent")
        assert {path.name for path in tmp_path.iterdir()} == {"a.json", "notes.part", living.name}


def test_first_file_of_a_process_removes_the_parts_of_killed_writers(tmp_path):
    (tmp_path / "b.json.host-12-0123abcd.part").touch()
    write_text(tmp_path / "a.json", "")
    assert os.listdir(tmp_path) == ["a.json"]


def test_part_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, removed = files.lock_file, []

    def late(file, **options):
        if not removed:
            removed.append(file.name)
            os.unlink(file.name)
        lock(file, **options)

    monkeypatch.setattr(files, "lock_file", late)
    write_text(tmp_path / "a.json", "text")
    assert (tmp_path / "a.json").read_text() == "text" and os.listdir(tmp_path) == ["a.json"] and removed


def test_without_locks_only_old_parts_are_dead(tmp_path, monkeypatch):
    def no_locks(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "lock_file", no_locks)
    for name, age in (("new.1.part", 10), ("old.1.part", 2 * 24 * 3600)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (files.time.time() - age,) * 2)
    assert [path.name for path in dead_parts(tmp_path)] == ["old.1.part"]


@pytest.mark.parametrize("name", [None, "temporary", "other"])
def test_error_names_the_file_and_not_its_temporary(tmp_path, name):
    path = tmp_path / "table.json"
    with pytest.raises(OSError) as caught, atomic_path(path) as part:
        raise OSError(errno.ENOSPC, "No space left on device", {"temporary": str(part)}.get(name, name))
    assert caught.value.filename == ("other" if name == "other" else str(path)) and not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="here"), naming_file(Path("here")):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_sizes_are_written_as_people_read_them():
    assert [size_text(size) for size in (0, 999, 1e3, 12_345_678, 5e9, 2.5e13)] == [
        "0 B", "999 B", "1.0 kB", "12.3 MB", "5.0 GB", "25.0 TB",
    ]  # fmt: skip
    assert [size_text(size, binary=True) for size in (1023, 2048, 2**30)] == ["1023 B", "2.0 KiB", "1.0 GiB"]


@contextmanager
def full_disk(size: int = 4096) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes: a write fails as on a full disk, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_figure(path: Path) -> None:
    from PIL import Image

    with atomic_path(path, PATIENT_DATA) as part:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(part, "PNG")


def write_tar(path: Path) -> None:
    tar = TarWriter(path)
    tar.add("a.jpg", bytes(20_000))
    tar.close()


def write_archive(path: Path) -> None:
    (path.parent / "content").mkdir()
    (path.parent / "content" / "a").write_bytes(bytes(100))
    for number in range(40):
        (path.parent / "content" / str(number)).write_bytes(bytes(100))
    write_zip(path.parent / "content", path)


NUMBERS = np.random.default_rng(0).random(20_000).astype(np.float32)
WRITERS = {
    "text": lambda path: write_text(path, "a" * 20_000),
    "JSON": lambda path: write_checked_json(path, {"a": "b" * 20_000}),
    "parquet": lambda path: write_checked_parquet(path, pa.table({"a": NUMBERS})),
    "tensors of NumPy": lambda path: write_checked_tensors(path, {"a": NUMBERS}),
    "tensors of PyTorch": lambda path: write_tensors(path, {"a": torch.from_numpy(NUMBERS)}),
    "picture": write_figure,
    "tar": write_tar,
    "zip": write_archive,
    "copy": lambda path: copy_file(Path(__file__), path),
    "tokens": lambda path: TokenCache(path, 3, (4, 500)).write("plain", 0, np.zeros((3, 2, 4, 500))),
    "submission": lambda path: write_numbers_atomically(path),
}


def write_numbers_atomically(path: Path) -> None:
    with atomic_path(path) as part:
        write_numbers(part, [f"IL_{number}" for number in range(2_000)], np.ones((2_000, 2)), ["A", "B"])


@pytest.mark.parametrize("kind", WRITERS)
def test_full_disk_names_the_file_and_leaves_no_part(tmp_path, kind):
    path = tmp_path / "file"
    with pytest.raises(OSError) as caught, full_disk():
        WRITERS[kind](path)
    assert caught.value.errno == errno.EFBIG and caught.value.strerror == os.strerror(errno.EFBIG)
    assert str(caught.value.filename).startswith(str(path))
    assert not list(tmp_path.rglob("*.part"))
