"""Refitted networks of a run predict photos as they predict a packed set."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.inference import small_run
from tests.inference.small_tower import SMALL_TOWER
from triderm_dist.config import Experiment, load_run
from triderm_dist.data.photo_set import PhotoSet
from triderm_dist.data.shards.open import open_index
from triderm_dist.engine.predict_test import predict_test
from triderm_dist.engine.refit import refit
from triderm_dist.ensemble.predict import predict_ensemble
from triderm_dist.inference.predictor import Predictor
from triderm_dist.inference.run_folder import open_run_folder
from triderm_dist.models.towers import TOWER_SOURCES
from triderm_dist.predictions import average_test, read_predictions
from triderm_dist.schema import DataError


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Experiment:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TOWER_SOURCES, "small", SMALL_TOWER)
        yield load_run(Experiment, small_run.train(tmp_path_factory.mktemp("refit")))


def test_refitted_networks_predict_photos_as_a_packed_set(run):
    with pytest.raises(DataError, match="refit/trimodal: not trained; run triderm refit first"):
        open_run_folder(run.folder, "refit")
    index = open_index(run.train_shards, run.data.remote)
    refit(run, index, list(run.models))
    predict_test(run, index, list(run.models), "refit")
    parts = [read_predictions(run.refit_folder(name) / "test.parquet") for name in run.models]
    packed = predict_ensemble(run.folder, average_test(parts), parts)

    photos: dict[str, bytes] = {}
    for shard in sorted(Path(index.folder).glob("*.tar")):
        with tarfile.open(shard) as archive:
            photos |= {member.name: archive.extractfile(member).read() for member in archive}
    lesions = PhotoSet(
        index.task, index.concepts,
        {view: [photos.get(f"{lesion}.{view}.jpg") for lesion in index.lesion_ids] for view in index.task.view_names},
        canvas=index.canvas, short_side=index.short_side, lesion_ids=index.lesion_ids, metadata=index.metadata,
        concept_scores=index.concept_scores,
    )  # fmt: skip
    predictor = Predictor(open_run_folder(run.folder, "refit"))
    answer = predictor.predict(lesions, run.predict.transforms)
    assert len(answer.parts) == len(run.models)
    np.testing.assert_allclose(answer.results.probabilities, packed.probabilities, atol=1e-6)
    by_folds = Predictor(open_run_folder(run.folder)).predict(lesions, run.predict.transforms)
    assert np.abs(by_folds.results.probabilities - answer.results.probabilities).max() > 1e-4
