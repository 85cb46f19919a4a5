"""A packed synthetic set and a tiny network for training tests."""

import fcntl
import os
from pathlib import Path

import pytest

from tests.processes import launch

TINY_TRIMODAL = """\
models:
  tri:
    width: 16
    heads: 2
    dropout: 0.2
    tower: {source: "timm:test_efficientnet", pretrained: false, image_size: 32, frozen: true}
"""
"""The end of settings: a tri-modal network on a frozen tower, with dropout."""


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> Path:
    """Shards of 100 synthetic lesions, created once for all pytest-xdist workers, next to their demo folder."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "packed"
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "shards").exists():
            launch("shards.demo", f"output={folder}/demo", "lesions=100", "test_lesions=50")
            launch("shards.pack", f"source={folder}/demo/train", f"output={folder}/shards", "short_side=null")
    return folder / "shards"
