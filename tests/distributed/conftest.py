"""Real processes: a packed demo set, and a way to start ranks on a free port."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY_TRIMODAL = """\
models:
  tri:
    width: 16
    heads: 2
    dropout: 0.2
    tower: {source: "timm:test_efficientnet", pretrained: false, image_size: 32, frozen: true}
"""
"""The end of settings: a tri-modal network on a frozen tower, with dropout."""


def launch(module_or_file: str, *arguments: str, ranks: int = 1, config: str | None = None, check: bool = True):
    """Run a program as `ranks` processes, under torchrun or, with `config`, under `accelerate launch`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    target = [module_or_file] if module_or_file.endswith(".py") else ["-m", module_or_file]
    if config:
        start = ["-m", "launch.ranks", "--config_file", config, "--num_processes", str(ranks)]
    elif ranks > 1:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    else:
        start = []
    command = [sys.executable, *start, *target, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> Path:
    """Shards of 100 synthetic lesions."""
    folder = tmp_path_factory.mktemp("demo")
    launch("shards.demo", f"output={folder}/demo", "lesions=100", "test_lesions=50")
    launch("shards.pack", f"source={folder}/demo/train", f"output={folder}/shards", "short_side=null")
    return folder / "shards"
