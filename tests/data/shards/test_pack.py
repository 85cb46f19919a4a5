"""Packing: a killed run resumes and gives the bytes of an uninterrupted one; all problems are reported."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.conftest import Challenge
from tests.processes import HANG_SECONDS, written_meanwhile
from triderm_dist.data.photo_formats import READ_FORMATS
from triderm_dist.data.problems import InvalidLesions
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.readers.lesion_table import LesionTable
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.colors import CMYK_PLAIN, ON_WHITE
from triderm_dist.data.shards.console import print_index
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.data.shards.pack import pack_shards, pack_slice
from triderm_dist.data.shards.shard_lesions import ShardLesions
from triderm_dist.data.shards.verify import verify
from triderm_dist.files import atomic_path
from triderm_dist.schema import Busy, DataError, Lesion

Make = Callable[..., Challenge]


def packed(dataset: Dataset, output: Path, **options: Any) -> ShardIndex:
    return pack_shards(dataset, output, **{"short_side": 24, "shard_samples": 5, "workers": 2, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def dataset(make_challenge: Make) -> Dataset:
    return read_challenge(make_challenge(lesions=33).folder)


class Stopped(BaseException):
    """Interrupts packing like Ctrl-C."""


def stop_at(lesions: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == lesions:
            raise Stopped

    return progress


def pack_and_die(folder: str, output: str, calls: int, pause: float) -> None:
    """Pack, and send SIGKILL `pause` seconds after the `calls`th call of the callback `progress`.

    That call waits for the signal, while the workers continue.
    """
    left = iter(range(calls))

    def progress(done: int, total: int) -> None:
        if next(left, None) == calls - 1:
            threading.Timer(pause, os.kill, (os.getpid(), signal.SIGKILL)).start()
            threading.Event().wait()

    pack_shards(read_challenge(folder), output, short_side=100, shard_samples=4, workers=2, progress=progress)


def test_packing_killed_at_random_moments_resumes_bit_identically(make_challenge: Make, tmp_path: Path) -> None:
    """Packing processes are killed until one finishes; its bytes equal those of an uninterrupted run."""
    challenge = make_challenge(lesions=100, size=(300, 220))
    pack_shards(read_challenge(challenge.folder), tmp_path / "reference", short_side=100, shard_samples=4)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.data.shards.test_pack"])
    draw = random.Random(0)
    kept = []
    for _ in range(20):
        calls, pause = draw.randrange(1, 45), draw.uniform(0, 0.02)
        process = context.Process(
            target=pack_and_die, args=(str(challenge.folder), str(tmp_path / "out"), calls, pause), daemon=True
        )
        process.start()
        process.join(HANG_SECONDS)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kept.append(len(list((tmp_path / "out.part").glob("rows/*.parquet"))))
    assert len(kept) >= 3 and kept == sorted(kept) and len(set(kept)) >= 3
    pack_shards(read_challenge(challenge.folder), tmp_path / "out", short_side=100, shard_samples=4)
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")
    assert not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("lesions", [1, 4, 5, 6, 17, 32, 33])
def test_interrupted_packing_resumes_and_keeps_finished_shards(dataset: Dataset, tmp_path: Path, lesions: int) -> None:
    """Finished shards are kept unchanged for any number of workers of either run."""
    packed(dataset, tmp_path / "reference")
    with pytest.raises(Stopped):
        packed(dataset, tmp_path / "out", progress=stop_at(lesions), workers=3)
    assert not (tmp_path / "out").exists()
    tars = tmp_path / "out.part" / "shards"
    kept = 7 if lesions == 33 else lesions // 5
    finished = {path: path.stat().st_mtime_ns for path in sorted(tars.glob("*.tar"))[:kept]}
    seen: list[tuple[int, int]] = []
    packed(dataset, tmp_path / "out", progress=lambda *now: seen.append(now), workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")
    assert {path: (tmp_path / "out" / path.name).stat().st_mtime_ns for path in finished} == finished
    assert seen[-1] == (33, 33) and len(seen) == kept + 33 - min(33, 5 * kept)
    assert not (tmp_path / "out.part").exists()


def test_changed_photos_and_damaged_tars_are_repacked(make_challenge: Make, tmp_path: Path) -> None:
    """After a photo is replaced by one of the same size and a tar is damaged, all other finished shards are kept."""
    challenge = make_challenge(lesions=33)
    dataset = read_challenge(challenge.folder)
    with pytest.raises(Stopped):
        packed(dataset, tmp_path / "out", progress=stop_at(26))
    tars = sorted((tmp_path / "out.part" / "shards").glob("*.tar"))
    index_of = {lesion.lesion_id: lesion for lesion in dataset.lesions}
    first = ShardLesions(LesionTable.of(dataset.lesions), 5)[0][0]
    photo = Path(str(index_of[first.lesion_id].images["clinical"]))
    data = photo.read_bytes()
    photo.write_bytes(data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])  # a different photo of the same length
    tars[2].write_bytes(tars[2].read_bytes()[:-1] + b"x")
    times = [path.stat().st_mtime_ns for path in tars]
    packed(dataset, tmp_path / "out")
    now = [(tmp_path / "out" / path.name).stat().st_mtime_ns for path in tars]
    assert [a == b for a, b in zip(now, times, strict=True)][:5] == [False, True, False, True, True]
    packed(read_challenge(challenge.folder), tmp_path / "reference")
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")


def test_packing_interrupted_at_the_last_step(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after the rename, before OUTPUT.part is removed."""
    monkeypatch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        packed(dataset, tmp_path / "out")
    monkeypatch.undo()
    assert (tmp_path / "out.part").exists()
    packed(dataset, tmp_path / "out")
    assert not (tmp_path / "out.part").exists()
    assert verify(read_index(tmp_path / "out"), 2, 0) == []


def test_packing_with_changed_settings_starts_over(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        packed(dataset, tmp_path / "out", progress=stop_at(20))
    packed(dataset, tmp_path / "out", short_side=20, shard_samples=12)
    packed(dataset, tmp_path / "reference", short_side=20, shard_samples=12)
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")


def test_slices_give_the_bytes_of_one_process(make_challenge: Make, tmp_path: Path) -> None:
    """Two processes pack slices into one folder at the same time, then one writes the index."""
    folder = make_challenge().folder
    next(folder.rglob("*.jpg")).write_bytes(b"no photo")
    dataset, options = read_challenge(folder), {"short_side": 24, "shard_samples": 5, "invalid": "drop"}
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=pack_slice, args=(dataset, tmp_path / "sliced", number, 2), kwargs=options)
        for number in (1, 2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANG_SECONDS)
    assert [process.exitcode for process in processes] == [0, 0]
    assert not (tmp_path / "sliced").exists()
    sliced = packed(dataset, tmp_path / "sliced", invalid="drop", finish=True)
    assert contents(sliced.folder) == contents(packed(dataset, tmp_path / "whole", invalid="drop").folder)
    assert not (tmp_path / "sliced.part").exists()


def test_slice_that_waited_for_the_finished_set_packs_nothing(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, output = packed(dataset, tmp_path / "first").folder, tmp_path / "out"
    with (
        written_meanwhile(output, lambda: first.rename(output), capsys),
        pytest.raises(DataError, match="out: exists; choose another output folder or delete this one"),
    ):
        pack_slice(dataset, output, 1, 2, short_side=24, shard_samples=5)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


@pytest.mark.parametrize("exists", [True, False])
def test_output_may_be_a_symbolic_link(dataset: Dataset, tmp_path: Path, exists: bool) -> None:
    """The set and its unfinished folder are where the link leads to, as on another disk, and the link stays."""
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to(disk / "set")
    if exists:
        (disk / "set").mkdir()
    with pytest.raises(Stopped):
        packed(dataset, link, progress=stop_at(20))
    assert (disk / "set.part").is_dir() and not (tmp_path / "link.part").exists()
    index = packed(dataset, link)
    assert [path.name for path in disk.iterdir()] == ["set"] and link.is_symlink()
    assert contents(link) == contents(packed(dataset, tmp_path / "reference").folder)
    assert packed(dataset, link).fingerprint == index.fingerprint


def test_slice_keeps_files_of_others_and_removes_leftovers(dataset: Dataset, tmp_path: Path) -> None:
    part = tmp_path / "out.part"
    pack_slice(dataset, tmp_path / "out", 2, 2, short_side=24, shard_samples=5)
    others = {path: path.read_bytes() for path in part.glob("*/*0000*")}
    assert len(others) == 6
    leftover = part / "shards" / "shard-000099.tar"  # of a run with smaller shards
    leftover.write_bytes(b"")
    with atomic_path(part / "rows" / "000001.parquet") as being_written:
        pack_slice(dataset, tmp_path / "out", 1, 2, short_side=24, shard_samples=5)
        assert being_written.exists() and not leftover.exists()
        being_written.write_bytes(others[part / "rows" / "000001.parquet"])
    assert others.items() <= {path: path.read_bytes() for path in part.glob("*/*0000*")}.items()


def test_finishing_needs_every_slice(dataset: Dataset, tmp_path: Path) -> None:
    options = {"short_side": 24, "shard_samples": 5}
    pack_slice(dataset, tmp_path / "out", 1, 2, **options)
    with pytest.raises(DataError, match=r"shard-000001\.tar: missing or damaged; run its slice again, as slice=2/7"):
        packed(dataset, tmp_path / "out", finish=True)
    pack_slice(dataset, tmp_path / "out", 2, 2, **{**options, "short_side": 23})
    with pytest.raises(DataError, match="other settings; run slice=2/7"):
        packed(dataset, tmp_path / "out", finish=True)
    pack_slice(dataset, tmp_path / "out", 2, 2, **options)
    tar = tmp_path / "out.part" / "shards" / "shard-000002.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard-000002\.tar: missing or damaged"):
        packed(dataset, tmp_path / "out", finish=True)
    assert len(packed(dataset, tmp_path / "out")) == len(dataset.lesions)  # packs again what is damaged


def test_shards_may_be_written_elsewhere(dataset: Dataset, tmp_path: Path) -> None:
    packed(dataset, tmp_path / "one")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    written: list[int] = []

    def elsewhere(
        work: Callable[[int, list[Lesion]], object], shards: Iterable[tuple[int, list[Lesion]]]
    ) -> Iterator[int]:
        for number, lesions in reversed([*shards]):
            there = pickle.loads(pickle.dumps((work, lesions)))
            before = [*(tmp_path / "many.part" / "rows").glob(f"{number:06d}.parquet")]
            there[0](number, there[1])
            written.append(number) if not before else None
            yield number
            if number == lost:
                raise KeyboardInterrupt

    lost = 3
    with pytest.raises(KeyboardInterrupt):
        packed(dataset, tmp_path / "many", distribute=elsewhere)
    (tmp_path / "many.part" / "shards" / "shard-000005.tar").write_bytes(b"cut off")  # by a process that was killed
    (tmp_path / "many.part" / "rows" / "000005.parquet").unlink()
    lost = -1
    packed(dataset, tmp_path / "many", distribute=elsewhere)
    assert written == [6, 5, 4, 3, 5, 2, 1, 0]
    assert {path.name: path.read_bytes() for path in (tmp_path / "many").iterdir()} == expected
    with pytest.raises(DataError, match=r"000000.parquet: missing, though its task has ended; give an output folder"):
        packed(dataset, tmp_path / "lost", distribute=lambda work, shards: (number for number, _ in shards))


def test_lesions_are_released_before_the_index(dataset: Dataset, tmp_path: Path) -> None:
    packed(dataset, tmp_path / "one")
    table = LesionTable.of([*dataset.lesions])
    index = packed(dataclasses.replace(dataset, lesions=table), tmp_path / "other", release_lesions=True)
    assert len(table) == 0 and len(index) == len(dataset.lesions) > 0
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_packing_locks_the_output_folder(dataset: Dataset, tmp_path: Path) -> None:
    def second(done: int, total: int) -> None:
        if done == 1:
            with pytest.raises(Busy, match=r"out.part: another process is packing this folder"):
                packed(dataset, tmp_path / "out")

    assert len(packed(dataset, tmp_path / "out", progress=second)) == 33


def fill_disk(folder: str, output: str, answer: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        packed(read_challenge(folder), Path(output))
    except DataError as error:
        answer.put(str(error))


def test_full_disk_is_a_one_line_error(make_challenge: Make, tmp_path: Path) -> None:
    """A limit on the file size simulates a full disk: the same write fails. Afterwards the same call resumes."""
    challenge = make_challenge(lesions=33)
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=fill_disk, args=(str(challenge.folder), str(tmp_path / "out"), answer))
    process.start()
    text = answer.get(timeout=HANG_SECONDS)
    process.join()
    assert "rerun the same command to resume" in text and "\n" not in text and not (tmp_path / "out").exists()
    assert len(packed(read_challenge(challenge.folder), tmp_path / "out")) == 33


def test_packing_reports_all_problems(make_challenge: Make, tmp_path: Path) -> None:
    """Problems of tables and photos are reported with lesion, kind and location; dropped lesions are counted."""
    challenge = make_challenge()
    challenge.metadata[3].update(site="torso")
    challenge.metadata[8].update(MONET_hair=7)
    challenge.truth[6].update(AKIEC=1.0)
    for row in (20, 21):
        challenge.photo(row).write_bytes(b"no photo")
    with pytest.raises(InvalidLesions, match=r"row 5: unknown site.*3 problems in 3 of 22 lesions.*invalid=drop"):
        read_challenge(challenge.write().folder)
    dataset = read_challenge(challenge.folder, invalid="drop")
    assert [problem.lesion_id for problem in dataset.problems] == ["IL_1007", "IL_1028", "IL_1042"]
    with pytest.raises(InvalidLesions, match="3 problems"):
        packed(dataset, tmp_path / "out")  # packing has a separate setting
    index = packed(dataset, tmp_path / "out", invalid="drop")
    assert [problem.kind for problem in index.problems] == ["cell", "cell", "label", "unreadable photo"]
    assert len(index) == 18 and not {"IL_1007", "IL_1028", "IL_1042", "IL_1070"} & set(index.lesion_ids)
    raw = json.loads((tmp_path / "out" / "index.json").read_text())
    assert raw["dropped"] == {"cell": 2, "label": 1, "unreadable photo": 1}
    assert read_index(tmp_path / "out").problems == index.problems


def test_shard_whose_lesions_are_all_dropped(make_challenge: Make, tmp_path: Path) -> None:
    challenge = make_challenge()
    dataset = read_challenge(challenge.folder)
    for lesion in ShardLesions(LesionTable.of(dataset.lesions), 5)[1]:
        Path(str(lesion.images["dermoscopic"])).write_bytes(b"")
    with pytest.raises(Stopped):
        packed(dataset, tmp_path / "out", invalid="drop", progress=stop_at(17))
    index = packed(dataset, tmp_path / "out", invalid="drop")
    assert [shard.url[6:12] for shard in index.shards] == ["000000", "000002", "000003", "000004"]
    assert index.shard.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 2
    assert verify(index, 2, 0) == []


def test_partly_labeled_and_unlabeled_sets(make_challenge: Make, tmp_path: Path) -> None:
    challenge = make_challenge()
    challenge.truth = challenge.truth[:15]
    index = packed(read_challenge(challenge.write().folder), tmp_path / "partly")
    assert index.unlabeled == 7 and verify(index, 2, 0) == []
    unlabeled = make_challenge(prefix="MILK10k_Test", labeled=False, name="test")
    index = packed(read_challenge(unlabeled.folder), tmp_path / "none")
    assert index.unlabeled == 22 and verify(index, 2, 0) == []


def test_memory_is_independent_of_the_size_of_the_set(make_challenge: Make, tmp_path: Path) -> None:
    """Only a few photos per worker are in memory at a time."""
    import tracemalloc

    challenge = make_challenge(lesions=120, size=(400, 300))
    size = sum(path.stat().st_size for path in challenge.folder.rglob("*.jpg"))
    dataset = read_challenge(challenge.folder)
    packed(dataclasses.replace(dataset, lesions=dataset.lesions[:3]), tmp_path / "warm")
    tracemalloc.start()
    packed(dataset, tmp_path / "out", shard_samples=40, workers=2, short_side=None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 2 + 3e6, (peak, size)


def test_open_index_remains_readable_after_its_folder_is_removed(dataset: Dataset, tmp_path: Path) -> None:
    packed(dataset, tmp_path / "out")
    index = read_index(tmp_path / "out")
    os.rename(tmp_path / "out" / "samples.parquet", tmp_path / "moved")
    os.remove(tmp_path / "moved")
    assert len(index.lesion_ids) == len(index.concept_scores) == 33


# Two photos of 32 x 24 pixels, and the hash of what commit 977cc2e packed from them, before there were tasks.
PHOTOS = [
    base64.b64decode(text)
    for text in (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6j"
        "q62rZ4C8ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
        "pKSkpKSkpKT/wAARCAAYACADASIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAAP/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/8QA"
        "FQEBAQAAAAAAAAAAAAAAAAAAAAT/xAAUEQEAAAAAAAAAAAAAAAAAAAAA/9oADAMBAAIRAxEAPwCgCdYAAAAAA//Z",
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6j"
        "q62rZ4C8ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
        "pKSkpKSkpKT/wAARCAAYACADASIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAAX/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/8QA"
        "FgEBAQEAAAAAAAAAAAAAAAAAAAID/8QAFBEBAAAAAAAAAAAAAAAAAAAAAP/aAAwDAQACEQMRAD8AmgIagAAAAAP/2Q==",
    )
]
PACKED_BEFORE_TASKS = "e3d99c80c2dc88d4bd01da56c911e827aa142192bbfe57d5fed1f2f19d21a80e"


def test_milk10k_is_packed_to_the_bytes_from_before_there_were_tasks(make_challenge: Make, tmp_path: Path) -> None:
    """The index of MILK10k differs by its entries `task` and `checksum` only; rows are compared by value, since pyarrow
    writes them.
    """
    challenge = make_challenge(lesions=22)
    for row in range(44):
        challenge.photo(row).write_bytes(PHOTOS[row % 2])
    index = pack_shards(read_challenge(challenge.folder), tmp_path / "out", short_side=None, shard_samples=8)
    content = json.loads((index.folder / "index.json").read_text())
    content.pop("task", None)
    content.pop("checksum")
    del content["samples"]["sha256"], content["samples"]["bytes"]
    rows = pq.read_table(index.folder / "samples.parquet")
    digest = hashlib.sha256(json.dumps(content).encode())
    digest.update(repr([(str(field.type), field.name) for field in rows.schema]).encode())
    digest.update(repr(rows.to_pylist()).encode())
    assert digest.hexdigest() == PACKED_BEFORE_TASKS


def test_a_copied_folder_gives_the_same_bytes_of_every_file(make_challenge: Make, tmp_path: Path) -> None:
    """The path, the order in which files were created, and texts of libraries reach no file."""
    challenge = make_challenge(lesions=9)
    Image.new("RGBA", (40, 30), (200, 100, 90, 128)).save(challenge.photo(0), "PNG")  # a PNG named .jpg
    Image.new("CMYK", (40, 30), (0, 90, 90, 40)).save(challenge.photo(2), "JPEG")
    challenge.photo(4).write_bytes(b"<!DOCTYPE html><title>Not found</title>")
    cut = challenge.photo(6).read_bytes()[:-2]
    challenge.photo(6).write_bytes(cut)
    challenge.photo(8).unlink()
    challenge.photo(8).symlink_to("nowhere")
    challenge.photo(10).unlink()
    challenge.photo(10).with_suffix(".dcm").write_bytes(bytes(128) + b"DICM")
    (challenge.folder / "MILK10k_Training_Input" / "more").mkdir()
    copied = challenge.folder / "MILK10k_Training_Input" / "more" / challenge.photo(12).name
    copied.write_bytes(b"another photo")
    challenge.photo(12).rename(challenge.photo(14).with_name(challenge.photo(12).name))
    other = tmp_path / "elsewhere" / "copy"
    files = sorted(path for path in challenge.folder.rglob("*") if not path.is_dir())
    for path in reversed(files):
        target = other / path.relative_to(challenge.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target, follow_symlinks=False)
    found = []
    for number, folder in enumerate((challenge.folder, other)):
        index = packed(read_challenge(folder, invalid="drop"), tmp_path / f"packed{number}", invalid="drop")
        found.append(contents(index.folder))
    assert found[0] == found[1]
    assert dict(index.converted) == {ON_WHITE: 1, CMYK_PLAIN: 1}
    text = found[0]["index.json"].decode()
    assert str(tmp_path) not in text and "object at" not in text
    assert {problem.what for problem in index.problems if problem.kind == "unreadable photo"} == {
        f"no {READ_FORMATS}, but a web page",
        f"truncated: {len(cut)} bytes without the end marker of a JPEG",
        "no such file",
        "isic_id: no photo ISIC_5010, but MILK10k_Training_Input/IL_1035/ISIC_5010.dcm, a DICOM file; convert it to "
        f"{READ_FORMATS}, with the suffix of that format",
        "isic_id: several photos are named ISIC_5012: MILK10k_Training_Input/IL_1049/ISIC_5012.jpg and "
        "MILK10k_Training_Input/more/ISIC_5012.jpg; keep one, or write the path in the table",
    }


def test_what_was_read_converted_and_dropped_is_printed(make_challenge: Make, tmp_path: Path, capsys: Any) -> None:
    challenge = make_challenge(lesions=5)
    Image.new("RGBA", (40, 30), (200, 100, 90, 128)).save(challenge.photo(0), "PNG")
    challenge.photo(4).write_bytes(b"")
    print_index(packed(read_challenge(challenge.folder), tmp_path / "packed", invalid="drop"))
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("read       5 lesions")
    assert lines[at + 1 : at + 4] == [
        "converted  1 photo with transparency, put on white",
        "dropped    1 lesion: unreadable photo, such as",
        "           MILK10k_Training_Input/IL_1014/ISIC_5004.jpg: no JPEG, PNG, WebP,",
    ]
    assert "packed     4 lesions, 8 photos" in lines
    print_index(read_index(tmp_path / "packed"), "verified")
    assert "verified   4 lesions, 8 photos" in capsys.readouterr().out.splitlines()
