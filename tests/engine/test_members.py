"""Members of another kind: an MLP on mean tokens, and models that are trained with several seeds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.inference.small_run import train
from tests.inference.small_tower import SMALL_TOWER
from triderm_dist.checksums import read_checked_json
from triderm_dist.config import Experiment, load_run
from triderm_dist.data import token_cache
from triderm_dist.data.photo_set import PhotoSet
from triderm_dist.data.shards.open import open_index
from triderm_dist.engine.crossval import run_folds
from triderm_dist.engine.embed import embeddings
from triderm_dist.engine.extra_sets import prepare_trainings
from triderm_dist.engine.fold import assigned_folds, is_fold_finished
from triderm_dist.engine.predict_test import predict_test
from triderm_dist.engine.refit import refit
from triderm_dist.ensemble.fitted_ensemble import FittedEnsemble
from triderm_dist.inference.export import export_run
from triderm_dist.inference.predictor import Predictor
from triderm_dist.inference.run_folder import open_run_folder
from triderm_dist.models import towers
from triderm_dist.models.mlp import MeanComponents
from triderm_dist.predictions import average_test, read_oof, read_predictions
from triderm_dist.schema import VIEWS

TOWER = "tower: {source: 'small:', pretrained: false, frozen: true}"
MODELS = (
    f"models.mlp={{kind: mlp, width: 16, settings: {{components: 4}}, seeds: 2, {TOWER}}}",
    "models.mlp.train.augment.token_variants=1",
)
NAMES = ["mlp", "mlp-s1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(towers.TOWER_SOURCES, "small", SMALL_TOWER)
        return train(tmp_path_factory.mktemp("members"), MODELS)


@pytest.fixture(autouse=True)
def small_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(towers.TOWER_SOURCES, "small", SMALL_TOWER)


def test_seeds_are_members_with_weights_of_their_own(run: Path) -> None:
    table = read_oof(run / "oof.parquet")
    assert list(table.models) == NAMES and not np.allclose(table.logits["mlp"], table.logits["mlp-s1"])
    fit = read_checked_json(run / "ensemble.json")
    assert fit["members"] == [*NAMES, "stack"]
    assert any(note.startswith("mlp: nested macro F1 of its 2 seeds 0.") for note in fit["notes"])
    # The saved settings hold the model once, so that a change of it is a change of all its seeds.
    assert "mlp-s1" not in (run / "config.yaml").read_text().replace("fold", "")
    experiment = load_run(Experiment, run)
    index = open_index(experiment.train_shards, experiment.data.remote)
    assert all(is_fold_finished(experiment, index, name, fold) for name in NAMES for fold in range(2))


def test_notes_on_the_tower_are_printed_once_for_all_models(run: Path, tmp_path: Path, capsys) -> None:
    experiment = load_run(Experiment, run)
    index = open_index(experiment.train_shards, experiment.data.remote)
    moved = experiment.model_copy(update={"output": str(tmp_path / "run"), "tokens": str(tmp_path / "tokens")})
    prepare_trainings(moved, index, NAMES)
    assert capsys.readouterr().out.count("randomly initialized") == 1


def test_a_further_seed_is_the_training_of_that_seed(run: Path, tmp_path: Path) -> None:
    """With the same tokens."""
    experiment = load_run(Experiment, run)
    index = open_index(experiment.train_shards, experiment.data.remote)
    alone = experiment.model_copy(
        update={"output": str(tmp_path), "seed": 1, "token_seed": 0, "tokens": str(run / "tokens")}
    )
    run_folds(alone, index, ["mlp"], [0])
    one, other = (load_file(each.fold_folder(name, 0) / "weights.safetensors")
                  for each, name in ((alone, "mlp"), (experiment, "mlp-s1")))  # fmt: skip
    assert all(torch.equal(one[name], other[name]) for name in other)
    hashes = [read_checked_json(each.fold_folder(name, 0) / "fold.json")["identity"]
              for each, name in ((alone, "mlp"), (experiment, "mlp-s1"))]  # fmt: skip
    assert hashes[0] == hashes[1]


def shape_of(tokens: Path) -> list[int]:
    shape: list[int] = json.loads(tokens.read_bytes()[: token_cache.HEADER])["shape"]
    return shape


def test_cache_holds_mean_tokens_also_those_of_a_cache_of_all_tokens(run: Path, tmp_path: Path) -> None:
    experiment = load_run(Experiment, run)
    index = open_index(experiment.train_shards, experiment.data.remote)
    versions = {path.parent.name.split("-")[0] for path in (run / "tokens").glob("*-mean/*/*.tokens")}
    assert versions == {"plain", "augmented"} and not list((run / "tokens").glob("*[!n]/*/*.tokens"))
    means = embeddings(experiment, index, "mlp")[0]
    kinds = experiment.models["mlp"].model_copy(update={"kind": "trimodal", "heads": 2, "settings": {}})
    other = experiment.model_copy(update={"models": {"mlp": kinds}, "tokens": str(tmp_path), "output": str(tmp_path)})
    assert np.allclose(embeddings(other, index, "mlp")[0], means, atol=1e-3)  # computes and keeps all tokens
    again = experiment.model_copy(update={"tokens": str(tmp_path), "output": str(tmp_path)})
    whole = next(path for path in tmp_path.glob("*/plain/000000.tokens") if not path.parts[-3].endswith("-mean"))
    assert np.array_equal(embeddings(again, index, "mlp")[0], means)
    mean = next(tmp_path.glob("*-mean/plain/000000.tokens"))
    assert shape_of(whole)[0] > 1 == shape_of(mean)[0]


def test_components_are_of_the_lesions_of_training_only(run: Path) -> None:
    experiment = load_run(Experiment, run)
    index = open_index(experiment.train_shards, experiment.data.remote)
    folds, means = assigned_folds(index, experiment.data), embeddings(experiment, index, "mlp")[0]
    values = torch.from_numpy(means.reshape(len(index), 2, -1))
    for fold in range(2):
        weights = load_file(experiment.fold_folder("mlp", fold) / "weights.safetensors")
        for number, view in enumerate(index.signature.views):
            expected = MeanComponents([values.shape[2]], 4, used=True)
            expected.fit(values[(folds != fold) & (folds >= 0), number])
            assert torch.allclose(weights[f"views.{view}.basis"], expected.basis, atol=1e-5)
            assert torch.allclose(weights[f"views.{view}.center"], expected.center, atol=1e-5)


def test_photos_are_predicted_as_a_packed_test_set_is(run: Path) -> None:
    experiment, opened = load_run(Experiment, run), open_run_folder(run)
    index = open_index(experiment.train_shards, experiment.data.remote)
    predict_test(experiment, index, NAMES)
    parts = [read_predictions(path) for path in sorted(run.glob("mlp*/fold-*/test.parquet"))]
    expected = FittedEnsemble.load(run).predict(average_test(parts), parts)[0]
    photos = PhotoSet(
        opened.task, opened.concepts,
        {view: [f"{run.parent}/shards-photos/{name}-{view}.jpg" for name in index.lesion_ids] for view in VIEWS},
        canvas=opened.canvas, short_side=opened.short_side, lesion_ids=index.lesion_ids,
        concept_scores=index.concept_scores, metadata=index.metadata,
    )  # fmt: skip
    answer = Predictor(run, device="cpu").predict(photos, 2)
    assert list(answer.results.lesion_ids) == list(expected.lesion_ids)
    np.testing.assert_allclose(answer.results.probabilities, expected.probabilities, atol=1e-3)  # photos packed again
    assert answer.members.shape[0] == 3


@pytest.mark.slow
def test_exported_network_is_that_of_the_fold(run: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    export_run(run, tmp_path / "files", "torch_export", models=["mlp-s1"], folds=[1], report=lines.append)
    assert (tmp_path / "files" / "mlp-s1.fold-1.pt2").exists() and "differ from PyTorch's by at most" in lines[0]


def test_refit_of_a_further_seed(run: Path) -> None:
    experiment = load_run(Experiment, run)
    index = open_index(experiment.train_shards, experiment.data.remote)
    refit(experiment, index, ["mlp-s1"])
    assert (experiment.refit_folder("mlp-s1") / "fold.json").exists()
