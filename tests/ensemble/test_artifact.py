"""Round trip of ensemble.json."""

from pathlib import Path

import numpy as np
import pytest

from tests.ensemble.conftest import members_of
from tests.synthetic_run import labels_of
from triderm_dist.ensemble.artifact import Ensemble, read_artifact
from triderm_dist.ensemble.weights import fit_weights
from triderm_dist.schema import DIAGNOSES, DataError
from triderm_dist.tasks import milk10k_task

C = len(DIAGNOSES)


def test_ensemble_round_trip(tmp_path: Path) -> None:
    labels = labels_of(200)
    fitted = fit_weights(members_of(labels, [1.0, 2.0]), labels, ["a", "b"]).with_temperatures({"b": 1.5})
    fitted.save(tmp_path / "ensemble.json", milk10k_task(), scores={"a": 0.5})
    loaded = Ensemble.load(tmp_path / "ensemble.json")
    np.testing.assert_array_equal(loaded.weights, fitted.weights)
    np.testing.assert_array_equal(loaded.thresholds, fitted.thresholds)
    assert loaded.temperatures.tolist() == [1.0, 1.5] and loaded.members == ("a", "b")
    assert read_artifact(tmp_path / "ensemble.json")["scores"] == {"a": 0.5}
    with pytest.raises(DataError, match="has 2 members \\(a, b\\), got 1"):
        loaded.decide(members_of(labels, [1.0]))
    (tmp_path / "ensemble.json").write_text('{"format": "triderm-ensemble", "version": 99}')
    with pytest.raises(DataError, match="version 3"):
        Ensemble.load(tmp_path / "ensemble.json")
