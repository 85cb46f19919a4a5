"""What the report takes from the packed set of a run: missing photos, and lesions that packing left out."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.ensemble.conftest import experiment
from tests.synthetic_run import CONCEPTS, write_run
from triderm_dist.config import save
from triderm_dist.data.problems import Problem
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.ensemble.fit import fit_ensemble
from triderm_dist.environment import record_data
from triderm_dist.predictions import read_oof
from triderm_dist.report.content import Content
from triderm_dist.report.page import sections_of
from triderm_dist.report.slices import PHOTOS
from triderm_dist.schema import Lesion
from triderm_dist.tasks import milk10k_task

WITHOUT_CLOSE_UP = 120


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A stacked run with its packed set, of which 120 lesions lack the clinical photo and two were dropped."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    config = experiment(folder, enabled=False)
    fit_ensemble(folder, config)
    save(config, folder / "config.yaml")
    table, photo = read_oof(folder / "oof.parquet"), folder / "photo.png"
    Image.fromarray(np.full((8, 12, 3), 120, np.uint8)).save(photo)
    lesions = [
        Lesion(
            str(name),
            {"clinical": str(photo) if row >= WITHOUT_CLOSE_UP else None, "dermoscopic": str(photo)},
            tuple(concepts.tolist()), tuple(metadata.tolist()), int(label), str(name),
        )
        for row, (name, concepts, metadata, label) in enumerate(
            zip(table.lesion_ids, table.concepts, table.metadata, table.labels, strict=True)
        )
    ]  # fmt: skip
    problems = (
        Problem("x", "no photo", "table", ""),
        Problem("x", "age", "table", ""),
        Problem("y", "age", "table", ""),
    )
    dataset = Dataset(milk10k_task(), lesions, CONCEPTS, True, [], problems)
    pack_shards(dataset, folder / "shards" / "train", short_side=None, invalid="drop")
    return folder


def test_photos_and_exclusions_are_those_of_the_packed_set(run: Path) -> None:
    content = Content(run)
    assert content.photos is not None
    np.testing.assert_array_equal(content.photos[:, 0], np.arange(360) >= WITHOUT_CLOSE_UP)
    assert content.photos[:, 1].all()
    slices = {part.value: part for part in content.slices if part.field == PHOTOS}
    assert slices["without close-up photo"].lesions == WITHOUT_CLOSE_UP and len(slices) == 1
    tables = {table.name: table for section in sections_of(content) for table in section.tables}
    assert tables["cohort"].text("close-up photo", "all", group="missing") == "120 of 360 (33.3%)"
    assert tables["flow"].text("in the tables", "lesions") == "362"
    assert [tables["flow"].text(kind, "left_out") for kind in ("no photo", "age")] == ["1", "1"]


def test_a_set_that_is_not_the_one_of_the_run_is_not_used(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    record_data(moved, "train", {"fingerprint": "another", "lesions": 365, "labeled": 361})
    content = Content(moved)
    assert content.packed is None and content.photos is None and content.packing is None
    assert [(step.what, step.lesions) for step in content.flow] == [
        *(("packed", 365), ("without a diagnosis", 4)),
        *(("without a held-out prediction of every network", 1), ("scored", 360)),
    ]
    record_data(moved, "train", {"fingerprint": "another", "lesions": 365, "flow": {"dropped": {"age": 2}}})
    assert Content(moved).flow[0].lesions == 367
