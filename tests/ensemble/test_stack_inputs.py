"""The columns that a stacker reads."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.synthetic_run import CLINIC, write_run
from triderm_dist.ensemble.columns import ColumnFile, batches_of
from triderm_dist.ensemble.stack_inputs import (
    EmbeddingTower,
    base_columns,
    column_names,
    embedding_tower,
    read_embeddings,
    write_embeddings,
)
from triderm_dist.predictions import OofTable, read_oof
from triderm_dist.schema import DataError


def test_columns_are_log_probabilities_concepts_and_metadata(table: OofTable) -> None:
    columns, names = base_columns(table), column_names(table)
    assert columns.shape == (len(table), len(names))
    assert len(set(names)) == len(names) == 2 * 3 * 11 + 14 + len(table.task.fields)
    logits = table.logits["trimodal"].astype(float)
    log_p = logits[:, 7] - np.log(np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(columns[:, names.index("trimodal/logit/MEL")], log_p, rtol=1e-4)
    assert np.isnan(columns).sum() == np.isnan(table.concepts).sum() + np.isnan(table.metadata).sum()


def test_columns_ignore_an_offset_on_all_softmax_logits(table: OofTable) -> None:
    shifted = table.logits | {"trimodal": table.logits["trimodal"] + 3.0}
    np.testing.assert_allclose(base_columns(replace(table, logits=shifted)), base_columns(table), atol=1e-5)


def test_column_file_round_trip(table: OofTable, tmp_path: Path) -> None:
    columns = base_columns(table)
    file = ColumnFile.write(tmp_path / "columns.parquet", np.array_split(columns, 7))
    assert file.shape == columns.shape
    np.testing.assert_array_equal(np.concatenate([batch for _, batch in file.batches()]), columns)
    rows = np.flatnonzero(table.folds != 0)
    np.testing.assert_array_equal(np.concatenate([batch for _, batch in batches_of(file, rows)]), columns[rows])
    (tmp_path / "other.parquet").write_text("hello")
    with pytest.raises(DataError, match=r"other\.parquet: not a file of the stacker's columns"):
        ColumnFile(tmp_path / "other.parquet")


def test_embeddings_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    write_embeddings(path, ["a", "b"], np.eye(2), EmbeddingTower("timm:a", "0a"))
    values, tower = read_embeddings(path, np.array(["b", "a"], object))
    np.testing.assert_array_equal(values, [[0, 1], [1, 0]])
    assert tower == ("timm:a", "0a")
    with pytest.raises(DataError, match="has no lesion c"):
        read_embeddings(path, np.array(["c"], object))


def test_tower_of_embeddings_is_read_without_them(tmp_path: Path) -> None:
    path = tmp_path / "embeddings.train.parquet"
    tower = EmbeddingTower("timm:a", "0a")
    write_embeddings(path, [f"lesion-{row}" for row in range(1000)], np.random.default_rng(0).random((1000, 64)), tower)
    content = path.read_bytes()
    assert embedding_tower(tmp_path) == tower
    path.write_bytes(bytes(4) + b"damaged" + content[11:])  # the embeddings, which reading them notices
    assert embedding_tower(tmp_path) == tower
    with pytest.raises(DataError, match="not a readable parquet file"):
        read_embeddings(path, [])
    path.write_bytes(content)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"tower": b"timm:b"}), path)
    with pytest.raises(DataError, match="does not match its checksums; delete it and run triderm embed again"):
        embedding_tower(tmp_path)


def test_columns_of_a_task_with_one_view_and_no_concepts(tmp_path: Path) -> None:
    write_run(tmp_path, 80, task=CLINIC)
    table = read_oof(tmp_path / "oof.parquet")
    names = column_names(table, ["dual_cnn"])
    assert names == (
        *(f"dual_cnn/logit/{name}" for name in CLINIC.diagnosis_names),
        *("metadata/fototyp", "metadata/n_lesions", "metadata/smoker"),
    )
    columns = base_columns(table, ["dual_cnn"])
    assert columns.shape == (80, 7) and np.isfinite(columns[:, :4]).all()
    np.testing.assert_array_equal(columns[:, 4:], table.metadata)
    bare = replace(table, task=replace(CLINIC, fields=()), metadata=np.empty((80, 0), np.float32))
    assert base_columns(bare).shape == (80, len(column_names(bare))) == (80, 8)
