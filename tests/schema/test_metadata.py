"""Metadata fields: an entry of the task is used by the reader, shards, networks, stacker and report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import Challenge
from tests.synthetic_run import predictions_of
from triderm_dist.checksums import write_checked_json
from triderm_dist.config import ModelConfig
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.data.shards.verify import verify
from triderm_dist.data.synthetic import write_synthetic
from triderm_dist.models import build_network
from triderm_dist.models.attention import semantic_values
from triderm_dist.models.towers import TokenShape
from triderm_dist.predictions import read_predictions, write_predictions
from triderm_dist.report.slices import slice_masks
from triderm_dist.schema import ConfigError, MetadataField
from triderm_dist.tasks import milk10k_task

DIAMETER = MetadataField("diameter", "diameter_mm", "number", low=1.0, high=30.0, unit="mm")
ITCH = MetadataField("type", "itches", "category", ("no", "yes"), synonyms={"TRUE": "yes", "false": "no"})


TASK = replace(milk10k_task(), fields=(*milk10k_task().fields, DIAMETER, ITCH))


@pytest.mark.parametrize("text", ["yes", "YES", "true", "1.0"])
def test_categories_and_synonyms_are_matched_in_any_case(text: str) -> None:
    field = MetadataField("smokes", "smokes", "category", ("no", "yes"), synonyms={"true": "yes", "1": "yes"})
    assert field.parse(text) == 1.0 and field.cell(1.0) == "yes" and field.cell(float("nan")) is None


@pytest.mark.parametrize("text", ["upper_arm", "Upper arm", "upper-arm", "UPPER  ARM"])
def test_separators_of_a_category_may_differ(text: str) -> None:
    assert MetadataField("site", "site", "category", ("hand", "upper_arm")).parse(text) == 1.0


@pytest.mark.parametrize("text", ["0.9", "30.1", "wide", "nan", "inf", "1_0", "\u0661\u0660", "0x10"])
def test_number_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=rf"diameter_mm '{text}' is not a number from 1 to 30 mm"):
        DIAMETER.parse(text)
    assert DIAMETER.scaled(DIAMETER.parse("15.5")) == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "text"}, "its kind is 'text'; known are number, category and ordinal"),
        ({"kind": "category", "categories": ("one",)}, "at least two categories"),
        ({"kind": "number", "categories": ("a", "b")}, "a number has no categories"),
        ({"kind": "number", "low": 2.0}, "low must be below high"),
        ({"kind": "number", "full_scale": 0.0}, "low must be below high and full_scale"),
        ({"kind": "ordinal", "categories": ("a", "A")}, "a spelling occurs twice"),
        ({"kind": "ordinal", "categories": ("a", "b"), "synonyms": {"c": "d"}}, "names an unknown category"),
    ],
)
def test_contradictory_field_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MetadataField("x", "x", **settings)


def test_fields_of_the_task_are_packed_and_read_by_name(make_challenge: Any, tmp_path: Path) -> None:
    challenge: Challenge = make_challenge(lesions=22)
    for number, row in enumerate(challenge.metadata):
        lesion = number // 2
        row |= {"diameter_mm": "" if lesion == 3 else 1.5 + lesion, "itches": ("TRUE", "no", "n/a")[lesion % 3]}
    challenge.write()
    index = pack_shards(read_challenge(challenge.folder, TASK), tmp_path / "shards", short_side=None)
    assert index.task == TASK and index.metadata.shape == (22, 6)
    first = np.argsort(np.asarray(index.lesion_ids))[:4]
    np.testing.assert_array_equal(index.metadata[first, 4:], [[1.5, 1], [2.5, 0], [3.5, np.nan], [np.nan, 1]])
    assert verify(index, folds=2, fold_seed=0) == []

    def reread(**changes: Any) -> ShardIndex:
        raw = json.loads((index.folder / "index.json").read_text())
        write_checked_json(tmp_path / "index.json", raw | {"task": replace(TASK, **changes).to_mapping()})
        (tmp_path / "index.json").replace(index.folder / "index.json")
        return read_index(index.folder)

    np.testing.assert_array_equal(reread(fields=TASK.fields[::-1]).metadata, index.metadata[:, ::-1])
    without = reread(fields=TASK.fields[:4])
    np.testing.assert_array_equal(without.metadata, index.metadata[:, :4])
    assert "metadata field 'diameter' of these shards is not used" in " ".join(without.notes())
    more = reread(fields=(*TASK.fields, MetadataField("pain", "pain", "number")))
    np.testing.assert_array_equal(more.metadata[:, :6], index.metadata)
    assert np.isnan(more.metadata[:, 6]).all()


def test_shards_with_fields_of_a_plugin_can_be_read(make_challenge: Any, tmp_path: Path) -> None:
    """Before tasks, plugins added fields, and index.json listed their categories."""
    index = pack_shards(read_challenge(make_challenge(lesions=22).folder, TASK), tmp_path / "shards", short_side=None)
    raw = json.loads((index.folder / "index.json").read_text())
    write_checked_json(index.folder / "index.json", {**raw, "metadata_categories": {"type": ["no", "yes"]}})
    read_index(index.folder)
    del raw["task"]
    write_checked_json(index.folder / "index.json", {**raw, "metadata_categories": {"type": ["no", "yes"]}})
    read = read_index(index.folder)
    assert read.task == milk10k_task()
    np.testing.assert_array_equal(read.metadata, index.metadata[:, :4])


def test_field_without_a_column_is_missing(make_challenge: Any) -> None:
    data = read_challenge(make_challenge(lesions=22).folder, TASK)
    assert all(np.isnan(lesion.metadata[4:]).all() for lesion in data.lesions)
    assert any(note.endswith("diameter is missing for every lesion") for note in data.notes), data.notes


@pytest.mark.parametrize("kind", ["trimodal", "dual_cnn"])
def test_networks_use_every_field(kind: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"kind": kind, "width": 32, "heads": 4})
    network = build_network(config, TASK.signature(("hair",)), TokenShape(4, 8)).eval()
    views, present, concepts = torch.randn(2, 1, 4, 8), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 1)

    def logits(**changes: float) -> torch.Tensor:
        values = {"age": 50.0, "sex": 0.0, "skin_tone": 2.0, "site": 3.0, "diameter": 4.0, "type": 0.0, **changes}
        metadata = torch.tensor([[values[name] for name in TASK.field_names]])
        return network(*views, present, concepts, metadata).logits

    for name in TASK.field_names:
        seen = [logits(), logits(**{name: 1.0}), logits(**{name: float("nan")})]
        assert not any(torch.equal(seen[a], seen[b]) for a, b in ((0, 1), (0, 2), (1, 2))), name


def test_network_parameter_names_are_stable() -> None:
    """Checkpoints of earlier versions use these names."""
    config = ModelConfig.model_validate({"width": 32, "heads": 4})
    names = build_network(config, milk10k_task().signature(("hair",)), TokenShape(4, 8)).state_dict()
    assert [name for name in names if name.startswith("semantic.")] == [
        "semantic.null",
        *(f"semantic.concepts.{part}" for part in ("name", "missing", "curve")),
        *(f"semantic.age.{part}" for part in ("name", "missing", "curve")),
        *(f"semantic.categories.{field}.embedding.weight" for field in ("sex", "skin_tone", "site")),
    ]


def test_predictions_of_earlier_versions_are_of_milk10k(tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    write_predictions(path, predictions_of("trimodal", np.arange(3), 0, ["a", "b", "c"], 0))
    table = pq.read_table(path)
    head = json.loads(table.schema.metadata[b"triderm"])
    for key in ("task", "metadata_fields"):  # of the previous, and of the first version
        assert head.pop(key)
        pq.write_table(table.replace_schema_metadata({b"triderm": json.dumps(head)}), path)
        assert read_predictions(path).task == milk10k_task()


def test_attention_labels_have_values_with_units() -> None:
    values = semantic_values((), np.empty(0), TASK.fields, np.array([50, 1, 3, np.nan, 4.5, 0]))
    assert values == {
        "age": "50 years",
        "sex": "male",
        "skin_tone": "3",
        "site": "missing",
        "diameter": "4.5 mm",
        "type": "no",
    }


def test_slices_of_the_report_cover_every_lesion_once() -> None:
    generator = np.random.default_rng(0)
    for field in TASK.fields:
        values = generator.uniform(1, 30, 200) if field.is_number else generator.integers(0, 2, 200).astype(float)
        values[::7] = np.nan
        masks = slice_masks(field, values)
        assert (sum(mask.astype(int) for mask in masks.values()) == 1).all(), field.name
    ages = slice_masks(TASK.fields[0], np.array([39.0, 40, 75, np.nan]))
    assert list(ages) == ["under 40", "40 to under 60", "60 to under 75", "75 and over", "missing"]
    assert list(slice_masks(DIAMETER, np.full(3, np.nan))) == ["missing"]


def test_synthetic_data_has_every_field_of_the_task(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "demo", TASK, 80, 40, seed=0)
    lesions = read_challenge(tmp_path / "demo" / "train", TASK).lesions
    values = np.array([lesion.metadata for lesion in lesions])
    assert 1 <= np.nanmin(values[:, 4]) < 5 and 25 < np.nanmax(values[:, 4]) <= 30
    assert set(values[:, 5][~np.isnan(values[:, 5])]) == {0.0, 1.0}
