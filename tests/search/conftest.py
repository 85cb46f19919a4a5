"""A tiny experiment, and files of search spaces."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.browser import browser  # noqa: F401
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.pack import pack_shards


def space_file(folder: Path, text: str) -> Path:
    path = folder / "space.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def tiny(make_challenge: Callable, tmp_path: Path) -> Path:
    """Experiment file with 44 packed lesions and a frozen tower; takes seconds per epoch."""
    shards = tmp_path / "shards"
    pack_shards(read_challenge(make_challenge(lesions=44).folder), shards, short_side=None)
    import timm
    from safetensors.torch import save_file

    weights = tmp_path / "tower.safetensors"
    save_file(timm.create_model("test_efficientnet", num_classes=0).state_dict(), weights)
    tower = {"source": f"timm:test_efficientnet@{weights}", "image_size": 32, "frozen": True}
    tree = {
        "output": str(tmp_path / "run"),
        "data": {"shards": str(shards), "folds": 2},
        "train": {
            "epochs": 3,
            "global_batch": 16,
            "micro_batch": 16,
            "select": "last",
            "optim": {"lr": 1e-3, "min_lr": 1e-6, "warmup_epochs": 1},
        },
        "models": {"small": {"width": 32, "heads": 4, "mlp_ratio": 1.0, "tower": tower}},
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
