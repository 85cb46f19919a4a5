"""Tokens of frozen towers in the cache: by the backends of CPUs, and in batches that overlap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from triderm_dist.config import Experiment, load
from triderm_dist.data.token_cache import CHUNK
from triderm_dist.distributed import parallel
from triderm_dist.engine import views
from triderm_dist.engine.bench import synthetic_shards
from triderm_dist.models.cpu_tower import TOLERANCE

LESIONS = CHUNK + 10


def extracted(run: Path, tokens: str) -> dict[str, np.ndarray]:
    """Compute the tokens of a run into a folder of their own; returns those of every chunk, by file."""
    experiment = load(
        Experiment,
        None,
        [
            f"output={run}",
            f"tokens={run / tokens}",
            "models.net={width: 16, heads: 2}",
            "models.net.tower={source: 'timm:test_efficientnet', pretrained: false, image_size: 32, frozen: true}",
            "train={augment: {token_variants: 1}, precision: fp32}",
        ],
    )
    index = synthetic_shards(run / "shards", LESIONS, 40)
    accelerator = parallel.start_inference("fp32")
    views.open_views(experiment, experiment.models["net"], index, accelerator, train=True, transforms=2)
    files = sorted((run / tokens).rglob("*.npy"))
    return {str(file.relative_to(run / tokens)): np.load(file) for file in files}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def fast(run: Path) -> dict[str, np.ndarray]:
    return extracted(run, "fast")


def test_cached_tokens_are_those_of_plain_pytorch(
    run: Path, fast: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(views, "MIN_PHOTOS", 10**9)
    plain = extracted(run, "plain")
    assert "computed by" not in capsys.readouterr().out
    assert list(fast) == list(plain) and len(fast) == 2 * 3  # plain, augmented, one transform
    for name, tokens in plain.items():
        expected = tokens.astype(np.float32)
        largest = np.abs(expected).max()
        rounding = np.spacing(np.abs(tokens)).astype(np.float32)
        assert (np.abs(fast[name] - expected) <= TOLERANCE * largest + rounding).all(), name
        assert len(np.unique(expected.reshape(len(expected), -1), axis=0)) == len(expected)  # photos differ


def test_the_same_backend_gives_the_same_bytes(run: Path, fast: dict[str, np.ndarray]) -> None:
    for path in (run / "fast").rglob("000001.npy"):  # a resumed run computes what is missing
        path.unlink()
    again = extracted(run, "fast")
    for name, tokens in fast.items():
        assert np.array_equal(again[name], tokens), name
