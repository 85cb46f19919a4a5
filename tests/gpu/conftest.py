"""Tests that need an NVIDIA GPU: `pytest -m gpu`. Without one they are skipped."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.data.synthetic import write_synthetic
from triderm_dist.tasks import milk10k_task

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if HERE in item.path.parents]
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    missing = bool(own) and not torch.cuda.is_available()
    for item in own:
        item.add_marker(pytest.mark.gpu)
        if missing:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the 100 synthetic lesions that tests/distributed trains on too."""
    folder = tmp_path_factory.mktemp("gpu")
    write_synthetic(folder / "demo", milk10k_task(), lesions=100, test_lesions=50, seed=0)
    pack_shards(read_challenge(folder / "demo" / "train"), folder / "shards", short_side=None)
    return folder / "shards"


@pytest.fixture(autouse=True)
def released_memory() -> Iterator[None]:
    """Free what a test has left on the GPU."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def exact_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let cuDNN compute convolutions of fp32 in fp32; by default it takes TF32, with 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
