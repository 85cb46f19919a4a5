"""Metadata fields: a new entry is used by the reader, shards, networks, stacker and report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import Challenge
from tests.synthetic_run import predictions_of
from triderm_dist.config import Experiment, ModelConfig
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.index import read_index
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.data.shards.verify import verify
from triderm_dist.data.synthetic import write_demo
from triderm_dist.engine.fold import result_hash
from triderm_dist.models import build_network
from triderm_dist.models.attention import semantic_values
from triderm_dist.models.towers import TokenShape
from triderm_dist.predictions import read_predictions, write_predictions
from triderm_dist.report.content import slice_masks
from triderm_dist.schema import (
    METADATA_FIELDS,
    MILK10K_FIELDS,
    ConfigError,
    DataError,
    MetadataField,
    add_field,
    one_line,
)
from triderm_dist.tasks import load_task, milk10k_task

DIAMETER = MetadataField("diameter", "diameter_mm", "number", low=1.0, high=30.0, unit="mm")
ITCH = MetadataField("type", "itches", "category", ("no", "yes"), synonyms={"TRUE": "yes", "false": "no"})


@pytest.fixture
def added() -> Iterator[None]:
    """Add both fields to METADATA_FIELDS for the duration of a test."""
    before = dict(METADATA_FIELDS)
    add_field(DIAMETER)
    add_field(ITCH)
    yield
    METADATA_FIELDS.clear()
    METADATA_FIELDS.update(before)


@pytest.mark.parametrize("text", ["yes", "YES", "true", "1.0"])
def test_categories_and_synonyms_are_matched_in_any_case(text: str) -> None:
    field = MetadataField("smokes", "smokes", "category", ("no", "yes"), synonyms={"true": "yes", "1": "yes"})
    assert field.parse(text) == 1.0 and field.cell(1.0) == "yes" and field.cell(float("nan")) is None


@pytest.mark.parametrize("text", ["0.9", "30.1", "wide", "nan", "inf"])
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
        ({"kind": "ordinal", "categories": ("a", "A")}, "a spelling occurs twice"),
        ({"kind": "ordinal", "categories": ("a", "b"), "synonyms": {"c": "d"}}, "names an unknown category"),
    ],
)
def test_contradictory_field_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MetadataField("x", "x", **settings)


def test_field_cannot_be_added_twice(added: None) -> None:
    add_field(DIAMETER)
    assert list(METADATA_FIELDS) == ["age", "sex", "skin_tone", "site", "diameter", "type"]
    with pytest.raises(ConfigError, match="field 'sex' has this name or column"):
        add_field(MetadataField("gender", "sex", "category", ("f", "m")))


def test_added_fields_are_packed_and_read_by_name(added: None, make_challenge: Any, tmp_path: Path) -> None:
    challenge: Challenge = make_challenge(lesions=22)
    for number, row in enumerate(challenge.metadata):
        lesion = number // 2
        row |= {"diameter_mm": "" if lesion == 3 else 1.5 + lesion, "itches": ("TRUE", "no", "n/a")[lesion % 3]}
    challenge.write()
    index = pack_shards(read_challenge(challenge.folder), tmp_path / "shards", short_side=None)
    assert index.metadata.shape == (22, 6)
    first = np.argsort(np.asarray(index.lesion_ids))[:4]
    np.testing.assert_array_equal(index.metadata[first, 4:], [[1.5, 1], [2.5, 0], [3.5, np.nan], [np.nan, 1]])
    assert verify(index, folds=2, fold_seed=0) == []

    # New shards are read without the plugin, and older shards with it.
    for name in ("diameter", "type"):
        METADATA_FIELDS.pop(name)
    without = read_index(tmp_path / "shards")
    np.testing.assert_array_equal(without.metadata, index.metadata[:, :4])
    assert "metadata field 'diameter' of these shards is not used" in " ".join(without.notes())
    older = pack_shards(read_challenge(challenge.folder), tmp_path / "older", short_side=None)
    add_field(ITCH)
    add_field(DIAMETER)
    np.testing.assert_array_equal(read_index(tmp_path / "shards").metadata[:, 4:], index.metadata[:, [5, 4]])
    reread = read_index(older.folder)
    np.testing.assert_array_equal(reread.metadata[:, :4], index.metadata[:, :4])
    assert np.isnan(reread.metadata[:, 4:]).all()
    METADATA_FIELDS["type"] = MetadataField("type", "itches", "category", ("yes", "no"))
    with pytest.raises(DataError, match="metadata field 'type' was packed with categories no, yes, this program has"):
        read_index(tmp_path / "shards")


def test_field_without_a_column_is_missing(added: None, make_challenge: Any) -> None:
    data = read_challenge(make_challenge(lesions=22).folder)
    assert all(np.isnan(lesion.metadata[4:]).all() for lesion in data.lesions)
    assert "22 of 22 lesions without diameter" in data.notes


@pytest.mark.parametrize("kind", ["trimodal", "dual_cnn"])
def test_networks_use_every_field(added: None, kind: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"kind": kind, "width": 32, "heads": 4})
    network = build_network(config, milk10k_task().signature(("hair",)), TokenShape(4, 8)).eval()
    views, present, concepts = torch.randn(2, 1, 4, 8), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 1)

    def logits(**changes: float) -> torch.Tensor:
        values = {"age": 50.0, "sex": 0.0, "skin_tone": 2.0, "site": 3.0, "diameter": 4.0, "type": 0.0, **changes}
        metadata = torch.tensor([[values[name] for name in METADATA_FIELDS]])
        return network(*views, present, concepts, metadata).logits

    for name in METADATA_FIELDS:
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


def test_prediction_files_name_their_fields(added: None, tmp_path: Path) -> None:
    labels = np.arange(3)
    made = predictions_of("trimodal", labels, 0, ["a", "b", "c"], 0)
    assert made.task.field_names == tuple(METADATA_FIELDS) and made.metadata.shape == (3, 6)
    write_predictions(tmp_path / "predictions.parquet", made)
    METADATA_FIELDS.pop("type")
    read = read_predictions(tmp_path / "predictions.parquet")
    assert read.task == made.task
    np.testing.assert_array_equal(read.metadata, made.metadata)


def test_predictions_of_earlier_versions_are_of_milk10k(tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    write_predictions(path, predictions_of("trimodal", np.arange(3), 0, ["a", "b", "c"], 0))
    table = pq.read_table(path)
    head = json.loads(table.schema.metadata[b"triderm"])
    for key in ("task", "metadata_fields"):  # of the previous, and of the first version
        assert head.pop(key)
        pq.write_table(table.replace_schema_metadata({b"triderm": json.dumps(head)}), path)
        assert read_predictions(path).task == milk10k_task()


def test_attention_labels_have_values_with_units(added: None) -> None:
    values = semantic_values((), np.empty(0), tuple(METADATA_FIELDS.values()), np.array([50, 1, 3, np.nan, 4.5, 0]))
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
    for field in (*MILK10K_FIELDS, DIAMETER, ITCH):
        values = generator.uniform(1, 30, 200) if field.is_number else generator.integers(0, 2, 200).astype(float)
        values[::7] = np.nan
        masks = slice_masks(field, values)
        assert (sum(mask.astype(int) for mask in masks.values()) == 1).all(), field.name
    ages = slice_masks(METADATA_FIELDS["age"], np.array([39.0, 40, 75, np.nan]))
    assert list(ages) == ["under 40", "40 to under 60", "60 to under 75", "75 and over", "missing"]
    assert list(slice_masks(DIAMETER, np.full(3, np.nan))) == ["missing"]


def test_synthetic_data_has_added_fields_and_is_otherwise_unchanged(tmp_path: Path, added: None) -> None:
    task = load_task("milk10k")
    write_demo(tmp_path / "demo", replace(task, fields=(*task.fields, DIAMETER, ITCH)), 80, 40, seed=0)
    lesions = read_challenge(tmp_path / "demo" / "train").lesions
    values = np.array([lesion.metadata for lesion in lesions])
    assert 1 <= np.nanmin(values[:, 4]) < 5 and 25 < np.nanmax(values[:, 4]) <= 30
    assert set(values[:, 5][~np.isnan(values[:, 5])]) == {0.0, 1.0}


def test_one_line_collapses_whitespace_and_shortens():
    error = ValueError("first\n  second\tthird")
    assert one_line(error) == "first second third"
    assert one_line(error, with_type=True) == "ValueError: first second third"
    assert one_line(error, 14) == "first seco ..." and len(one_line(error, 14)) == 14
    assert one_line(TimeoutError()) == one_line(TimeoutError(), with_type=True) == "TimeoutError"


def test_added_fields_change_the_hash_of_finished_folds() -> None:
    experiment, index = Experiment(), SimpleNamespace(fingerprint="0")
    before = result_hash(experiment, index, "trimodal", 0)  # type: ignore[arg-type]
    add_field(DIAMETER)
    try:
        assert result_hash(experiment, index, "trimodal", 0) != before  # type: ignore[arg-type]
    finally:
        METADATA_FIELDS.pop("diameter")
    assert result_hash(experiment, index, "trimodal", 0) == before  # type: ignore[arg-type]
