"""Damaged files of a trained run: each of its readers refuses them in one line, or reads the same as before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from tests.fuzz.checks import cases, fuzz, result_or_refusal
from tests.fuzz.mutations import edited_bytes, edited_fields, edited_json, without_checksum
from triderm_dist.config import Experiment, load_run
from triderm_dist.engine.network_files import read_info, read_weights
from triderm_dist.ensemble.fitted_stacker import FittedStacker
from triderm_dist.ensemble.run_files import read_nested
from triderm_dist.environment import read_environment
from triderm_dist.inference.run_folder import open_run_folder
from triderm_dist.models.tower_record import read_tower
from triderm_dist.monitoring.metrics_log import read_metrics
from triderm_dist.predictions import read_oof, read_predictions
from triderm_dist.search.trial import Trial, read_trial


@pytest.fixture(scope="module")
def run(trained_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(trained_run.folder, tmp_path_factory.mktemp("run") / "run")


def stacked(path: Path) -> list[float]:
    """Predict with a stacker, whose library must never get bytes that were not checked."""
    stacker = FittedStacker.load(path.with_name("stack.json"))
    return stacker.predict(np.zeros((2, stacker.width), np.float32)).ravel().tolist()


def opened(path: Path) -> list[Any]:
    """Open a run as predicting does."""
    folder = next(each for each in path.parents if (each / "config.yaml").is_file())
    found = open_run_folder(folder)
    return [found.canvas, found.short_side, found.concepts, found.task.meaning(), found.fitted.ensemble.members]


READERS: tuple[tuple[str, Callable[[Path], Any]], ...] = (
    ("config.yaml", lambda path: load_run(Experiment, path.parent).model_dump()),
    ("environment.json", lambda path: sorted(read_environment(path.parent))),
    ("ensemble.json", opened),
    ("stack.*", stacked),
    ("oof.parquet", lambda path: read_oof(path).labels.tolist()),
    ("ensemble_oof.parquet", lambda path: read_nested(path).labels.tolist()),
    ("towers/*.json", lambda path: read_tower(path.parent, path.stem)),
    ("tri/fold-0/fold.json", opened),
    ("tri/fold-0/weights.json", lambda path: read_info(path.with_suffix(""))),
    (
        "tri/fold-0/weights.safetensors",
        lambda path: {name: it.sum() for name, it in read_weights(path.with_suffix("")).items()},
    ),
    ("tri/fold-0/predictions.parquet", lambda path: read_predictions(path).labels.tolist()),
    ("tri/fold-0/metrics.jsonl", lambda path: [line["kind"] for line in read_metrics(path)]),
)
"""Files of a run, and what reads them. The result is compared with that of the undamaged file."""

NOT_CHECKED = ("config.yaml", "tri/fold-0/metrics.jsonl", "environment.json")
"""Files without a checksum, whose content may be another one."""


def files(run: Path) -> Iterator[tuple[Path, str, Callable[[Path], Any]]]:
    for pattern, read in READERS:
        paths = sorted(run.glob(pattern))
        assert paths, f"the run has no {pattern}"
        for path in paths:
            yield path, pattern, read


def damaged(path: Path) -> st.SearchStrategy[bytes]:
    """Damage the bytes of a file; of a JSON file also its tree, with its checksum and without."""
    data = path.read_bytes()
    anything = st.one_of(
        edited_bytes(data), edited_fields(data), st.sampled_from((b"", b"\0" * len(data), b"{}", b"null"))
    )
    if path.suffix != ".json":
        return anything
    tree = json.loads(data)
    return st.one_of(anything, edited_json(tree), edited_json(without_checksum(tree)))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [pattern for pattern, _ in READERS])
def test_damaged_file_of_a_run(run: Path, pattern: str) -> None:
    for path, own, read in files(run):
        if own == pattern:
            check_file(path, read, checked=pattern not in NOT_CHECKED)


def check_file(path: Path, read: Callable[[Path], Any], checked: bool) -> None:
    data, original = path.read_bytes(), read(path)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        found = result_or_refusal(lambda: read(path))
        unsigned = path.suffix == ".json" and b'"checksum"' not in content
        assert found is None or unsigned or not checked or found == original, "changed without a word"

    try:
        fuzz(check, damaged(path), 40)
    finally:
        path.write_bytes(data)


@cases(3, 80)
def test_damaged_trial(tmp_path: Path, cases: int) -> None:
    trial = Trial(3, {"train.optim.lr": 1e-4}, curve=[0.1, 0.2], changes=[{"epoch": 1, "trial": 2, "settings": {}}])
    (tmp_path / "trial-0003").mkdir()
    trial.write(tmp_path / "trial-0003")
    path = tmp_path / "trial-0003" / "trial.json"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        result_or_refusal(lambda: read_trial(path.parent), path)

    fuzz(check, damaged(path), cases)
