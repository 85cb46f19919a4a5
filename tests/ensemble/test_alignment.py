from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.ensemble.conftest import experiment
from tests.synthetic_run import FOLDS, MODELS, labels_of, write_run
from triderm_dist import metrics
from triderm_dist.ensemble.alignment import fit_alignments, load_alignments, save_alignments
from triderm_dist.ensemble.fit import fit_ensemble
from triderm_dist.ensemble.fitted_ensemble import FittedEnsemble
from triderm_dist.ensemble.stack_inputs import EmbeddingTower, embeddings_path, write_embeddings
from triderm_dist.predictions import (
    DataSplit,
    Predictions,
    average_test,
    gather,
    read_oof,
    read_predictions,
    write_oof,
    write_predictions,
)
from triderm_dist.schema import DataError


def write_rotated_run(folder: Path, dims: int = 6) -> np.ndarray:
    """Write a run whose fold models have the same features up to a rotation; return the labels.

    The features depend on the diagnosis, the logits do not.
    """
    labels = write_run(folder, 330, informed=False)
    generator = np.random.default_rng(0)
    centers = generator.normal(scale=3.0, size=(11, dims))
    of_test = centers[labels_of(150, seed=7)] + generator.normal(size=(150, dims))
    for model in MODELS:
        for fold in range(FOLDS):
            rotation = np.linalg.qr(generator.normal(size=(dims, dims)))[0]
            shift = generator.normal(size=dims)
            for name in ("predictions", "test"):
                path = folder / model / f"fold-{fold}" / f"{name}.parquet"
                part = read_predictions(path)
                own = of_test if name == "test" else centers[part.labels] + generator.normal(size=(len(part), dims))
                write_predictions(path, replace(part, features=own @ rotation + shift), split=part.split)
    table = read_oof(folder / "oof.parquet", features=True)
    gathered = gather(folder, None, DataSplit(table.lesion_ids, table.labels, table.folds))
    write_oof(folder / "oof.parquet", gathered)
    return labels


def parts_of(folder: Path) -> list[Predictions]:
    return [read_predictions(path) for path in sorted(folder.glob("*/fold-*/test.parquet"))]


def test_aligned_features_agree_between_folds(tmp_path: Path) -> None:
    write_rotated_run(tmp_path)
    parts = parts_of(tmp_path)
    alignments = fit_alignments(parts)
    for model in MODELS:
        own = [part for part in parts if part.model[0] == model]
        first = alignments[own[0].model_hash[0]](own[0].features)
        for part in own:
            alignment = alignments[part.model_hash[0]]
            np.testing.assert_allclose(alignment.rotation @ alignment.rotation.T, np.eye(6), atol=1e-5)
            np.testing.assert_allclose(alignment(part.features), first, atol=1e-4)
    # Independent of the order of lesions in a file.
    back = replace(parts[1], lesion_ids=parts[1].lesion_ids[::-1], features=parts[1].features[::-1])
    again = fit_alignments([parts[0], back, *parts[2:]])
    weights = parts[1].model_hash[0]
    np.testing.assert_allclose(again[weights].rotation, alignments[weights].rotation, atol=1e-5)
    save_alignments(tmp_path / "turns.safetensors", alignments)
    loaded = load_alignments(tmp_path / "turns.safetensors")
    assert list(loaded) == sorted(alignments)
    for weights, alignment in alignments.items():
        np.testing.assert_array_equal(loaded[weights].rotation, alignment.rotation)
    with pytest.raises(DataError, match="hold other lesions than the first fold"):
        fit_alignments([parts[0], replace(parts[1], lesion_ids=np.array([f"x{i}" for i in range(150)], object))])


def test_extra_columns_that_improve_the_score_are_used_on_a_test_set(tmp_path: Path) -> None:
    labels = write_rotated_run(tmp_path)
    ids = [f"lesion-{row:04d}" for row in range(len(labels))]
    noise = np.random.default_rng(0).normal(size=(len(labels), 20))
    write_embeddings(embeddings_path(tmp_path, "train"), ids[::-1], noise, EmbeddingTower("timm:a", "0a"))
    fit = fit_ensemble(tmp_path, experiment(tmp_path, extra=("embeddings", "features"), components=6, max_rounds=15))
    assert any("features are kept" in note for note in fit.notes)
    assert (tmp_path / "turns.safetensors").exists() and (tmp_path / "stack.safetensors").exists()
    scores = {row.name: row.nested.value for row in fit.rows}
    assert scores["stack"] > 0.6 > 0.25 > scores["trimodal"]
    parts = parts_of(tmp_path)
    table = average_test(parts)
    decisions = FittedEnsemble.load(tmp_path).predict(table, parts)[0].decisions
    assert metrics.macro_f1(decisions, table.labels) > scores["ensemble"] - 0.1
    other = [replace(part, model_hash=np.array("another")) for part in parts]
    with pytest.raises(DataError, match="was fitted on other weights"):
        FittedEnsemble.load(tmp_path).predict(table, other)
    fit_ensemble(tmp_path, experiment(tmp_path, max_rounds=3))  # without extra columns, their old files are removed
    assert not (tmp_path / "turns.safetensors").exists() and not (tmp_path / "stack.safetensors").exists()


def test_missing_extra_columns_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, 200)
    with pytest.raises(DataError, match=r"embeddings.train.parquet: no such file; run triderm embed first"):
        fit_ensemble(tmp_path, experiment(tmp_path, extra=("embeddings",), max_rounds=2))
    (tmp_path / "trimodal" / "fold-1" / "test.parquet").unlink()
    with pytest.raises(DataError, match=r"no test.parquet of trimodal .* run triderm predict submit=false first"):
        fit_ensemble(tmp_path, experiment(tmp_path, extra=("features",), max_rounds=2))
