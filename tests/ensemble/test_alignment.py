from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.ensemble.conftest import experiment
from tests.synthetic_run import FOLDS, MODELS, labels_of, write_run
from triderm_dist import metrics
from triderm_dist.ensemble.alignment import fit_turns, load_turns, save_turns
from triderm_dist.ensemble.fit import fit_final
from triderm_dist.ensemble.predict import predict_final
from triderm_dist.ensemble.stack_inputs import embeddings_path, read_embeddings, write_embeddings
from triderm_dist.predictions import (
    Predictions,
    average_test,
    gather,
    read_oof,
    read_predictions,
    write_oof,
    write_predictions,
)
from triderm_dist.schema import DataError


def turned_run(folder: Path, dims: int = 6) -> np.ndarray:
    """A run whose networks all see the same features of a lesion, each in a basis of its own; returns the labels.

    The first dimensions tell the diagnosis, which the logits do not.
    """
    labels = write_run(folder, 330, informed=False)
    generator = np.random.default_rng(0)
    told = generator.normal(scale=3.0, size=(11, dims))
    of_test = told[labels_of(150, seed=7)] + generator.normal(size=(150, dims))
    for model in MODELS:
        for fold in range(FOLDS):
            rotation = np.linalg.qr(generator.normal(size=(dims, dims)))[0]
            shift = generator.normal(size=dims)
            for name in ("predictions", "test"):
                path = folder / model / f"fold-{fold}" / f"{name}.parquet"
                part = read_predictions(path)
                own = of_test if name == "test" else told[part.labels] + generator.normal(size=(len(part), dims))
                write_predictions(path, replace(part, features=own @ rotation + shift), split=part.split)
    table = read_oof(folder / "oof.parquet", features=True)
    gathered = gather(folder, None, table.lesion_ids.tolist(), table.labels, table.folds)
    write_oof(folder / "oof.parquet", gathered)
    return labels


def parts_of(folder: Path) -> list[Predictions]:
    return [read_predictions(path) for path in sorted(folder.glob("*/fold-*/test.parquet"))]


def test_turned_features_mean_the_same_in_every_fold(tmp_path: Path) -> None:
    turned_run(tmp_path)
    parts = parts_of(tmp_path)
    turns = fit_turns(parts)
    for model in MODELS:
        own = [part for part in parts if part.model[0] == model]
        first = turns[own[0].model_hash[0]](own[0].features)
        for part in own:
            turn = turns[part.model_hash[0]]
            np.testing.assert_allclose(turn.rotation @ turn.rotation.T, np.eye(6), atol=1e-5)
            np.testing.assert_allclose(turn(part.features), first, atol=1e-4)
    # The order of lesions in a file changes nothing.
    back = replace(parts[1], lesion_ids=parts[1].lesion_ids[::-1], features=parts[1].features[::-1])
    again = fit_turns([parts[0], back, *parts[2:]])
    weights = parts[1].model_hash[0]
    np.testing.assert_allclose(again[weights].rotation, turns[weights].rotation, atol=1e-5)
    save_turns(tmp_path / "turns.safetensors", turns)
    loaded = load_turns(tmp_path / "turns.safetensors")
    assert list(loaded) == sorted(turns)
    for weights, turn in turns.items():
        np.testing.assert_array_equal(loaded[weights].rotation, turn.rotation)
    with pytest.raises(DataError, match="hold other lesions"):
        fit_turns([parts[0], replace(parts[1], lesion_ids=np.array([f"x{i}" for i in range(150)], object))])


def test_aligned_features_and_embeddings_are_kept_if_they_gain_and_used_on_a_test_set(tmp_path: Path) -> None:
    labels = turned_run(tmp_path)
    ids = [f"lesion-{row:04d}" for row in range(len(labels))]
    noise = np.random.default_rng(0).normal(size=(len(labels), 20))
    write_embeddings(embeddings_path(tmp_path, "train"), ids[::-1], noise, "a tower")
    fit = fit_final(tmp_path, experiment(tmp_path, extra=("embeddings", "features"), components=6, max_rounds=15))
    assert any("features are kept" in note for note in fit.notes)
    assert (tmp_path / "turns.safetensors").exists() and (tmp_path / "stack.safetensors").exists()
    scores = {row.name: row.nested.value for row in fit.rows}
    assert scores["stack"] > 0.6 > 0.25 > scores["trimodal"]
    parts = parts_of(tmp_path)
    table = average_test(parts)
    probabilities, thresholds = predict_final(tmp_path, table, parts)
    assert metrics.macro_f1(probabilities > thresholds, table.labels) > scores["ensemble"] - 0.1
    other = [replace(part, model_hash=np.array("another")) for part in parts]
    with pytest.raises(DataError, match="was fitted on other weights"):
        predict_final(tmp_path, table, other)
    fit_final(tmp_path, experiment(tmp_path, max_rounds=3))  # without them, nothing of them is left
    assert not (tmp_path / "turns.safetensors").exists() and not (tmp_path / "stack.safetensors").exists()


def test_missing_blocks_are_named(tmp_path: Path) -> None:
    write_run(tmp_path, 200)
    with pytest.raises(DataError, match=r"embeddings.train.parquet: no such file; run triderm embed first"):
        fit_final(tmp_path, experiment(tmp_path, extra=("embeddings",), max_rounds=2))
    (tmp_path / "trimodal" / "fold-1" / "test.parquet").unlink()
    with pytest.raises(DataError, match=r"no test.parquet of trimodal .* run triderm predict submit=false first"):
        fit_final(tmp_path, experiment(tmp_path, extra=("features",), max_rounds=2))
    path = tmp_path / "e.parquet"
    write_embeddings(path, ["a", "b"], np.eye(2), "tower")
    values, tower = read_embeddings(path, np.array(["b", "a"], object))
    np.testing.assert_array_equal(values, [[0, 1], [1, 0]])
    assert tower == "tower"
    with pytest.raises(DataError, match="has no lesion c"):
        read_embeddings(path, np.array(["c"], object))
