"""Fixtures for all tests: small challenge folders, newly written for each test."""

from __future__ import annotations

import csv
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from triderm_dist.data.readers.milk10k import MONET_COLUMNS
from triderm_dist.schema import DIAGNOSES
from triderm_dist.tasks import milk10k_task

# Locks are refused at once; tests of waiting set it.
os.environ["TRIDERM_LOCK_SECONDS"] = "0"

# Programs keep ignoring the signals that they were started to ignore, as those of a shell's background jobs are.
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)

# Deterministic examples, and no deadline: other tests share the cores.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.load_profile("fixed")

LONGEST = (
    *("benchmarks", "distributed/test_strategies.py", "search/test_study.py", "test_extending.py", "test_data_sets.py"),
    *("test_any_task.py", "distributed", "faults", "test_damaged_files.py", "test_wheel.py", "doctor", "monitoring"),
    *("inference/test_run.py", "test_run_folder.py", "test_launchers.py", "commands/test_bad_data.py"),
)
"""The slowest files and folders. They run first, so that the workers of pytest-xdist finish at the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def priority(item: pytest.Item) -> int:
        path = item.path.relative_to(Path(__file__).parent)
        names = {path.as_posix(), path.parts[0]}
        return next((number for number, name in enumerate(LONGEST) if name in names), len(LONGEST))

    items.sort(key=priority)


@pytest.fixture(autouse=True)
def fresh_accelerator_state() -> Iterator[None]:
    """Let no test run in the precision of an `Accelerator` of the test before, which the process keeps."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state()


IMAGE_TYPES = {"clinical": "clinical: close-up", "dermoscopic": "dermoscopic"}


@dataclass
class Challenge:
    """Tables of a challenge folder as lists of rows; edit the rows, then call `write()` again."""

    folder: Path
    prefix: str
    metadata: list[dict[str, Any]] = field(default_factory=list)
    truth: list[dict[str, Any]] = field(default_factory=list)

    @property
    def metadata_path(self) -> Path:
        return self.folder / f"{self.prefix}_Metadata.csv"

    @property
    def truth_path(self) -> Path:
        return self.folder / f"{self.prefix}_GroundTruth.csv"

    def photo(self, row: int) -> Path:
        cells = self.metadata[row]
        return self.folder / f"{self.prefix}_Input" / cells["lesion_id"] / f"{cells['isic_id']}.jpg"

    def write(self) -> Challenge:
        write_table(self.metadata_path, self.metadata)
        if self.truth:
            write_table(self.truth_path, self.truth)
        return self


def write_table(path: Path, rows: list[dict[str, Any]], newline: str = "\n", encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator=newline)
        writer.writeheader()
        writer.writerows(rows)


def draw_photo(seed: int, size: tuple[int, int] = (48, 36)) -> Image.Image:
    """Return a smooth random image, different for each seed."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC)


def write_challenge(
    folder: Path,
    lesions: int = 22,
    prefix: str = "MILK10k_Training",
    labeled: bool = True,
    size: tuple[int, int] = (48, 36),
) -> Challenge:
    """Write a challenge: lesion i has diagnosis i % 11, two photos and 14 scores; some have no age or site."""
    challenge, sites = Challenge(folder, prefix), milk10k_task().fields[3].categories
    scores = np.random.default_rng(0).random((lesions, 2, len(MONET_COLUMNS))).round(6)
    for i in range(lesions):
        lesion_id = f"IL_{1000 + 7 * i}"
        for v, kind in enumerate(IMAGE_TYPES.values()):
            row = {
                "lesion_id": lesion_id,
                "image_type": kind,
                "isic_id": f"ISIC_{5000 + 2 * i + v}",
                "attribution": "made for tests",
                "copyright_license": "CC-0",
                "image_manipulation": "synthetic",
                "age_approx": "" if i % 9 == 4 else 5 * (i % 17 + 1),
                "sex": ("male", "female")[i % 2],
                "skin_tone_class": i % 6,
                "site": "" if i % 10 == 6 else sites[i % len(sites)],
                **dict(zip(MONET_COLUMNS, scores[i, v].tolist(), strict=True)),
            }
            challenge.metadata.append(row)
            path = challenge.photo(len(challenge.metadata) - 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_photo(2 * i + v, size).save(path, quality=90)
        if labeled:
            truth = {name: float(label == i % len(DIAGNOSES)) for label, name in enumerate(DIAGNOSES)}
            challenge.truth.append({"lesion_id": lesion_id, **truth})
    return challenge.write()


@pytest.fixture
def make_challenge(tmp_path: Path) -> Callable[..., Challenge]:
    """Return `make_challenge(name="challenge", **options)`, which writes a challenge into tmp_path / name."""
    return lambda name="challenge", **options: write_challenge(tmp_path / name, **options)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the `TrainedRun` that all tests share, which do not write to it."""
    from tests.trained_run import train_run

    return train_run(tmp_path_factory.mktemp("trained"))
