"""Real processes: a packed demo set, and a way to start ranks on a free port."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fork_server import fork_python
from tests.processes import HANG_SECONDS

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


def start(
    module_or_file: str,
    *arguments: str,
    ranks: int = 1,
    config: str | None = None,
    fork: bool = True,
    environment: dict[str, str] | None = None,
) -> subprocess.Popen:
    """Start a program as `ranks` processes, under torchrun or, with `config`, under `accelerate launch`.

    With `fork` the processes are forks of one that has imported PyTorch.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})}
    target = [module_or_file] if module_or_file.endswith(".py") else ["-m", module_or_file]
    if config:
        launcher = ["-m", "launch.ranks", "--config_file", config, "--num_processes", str(ranks)]
    elif ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    else:
        launcher = []
    return subprocess.Popen(
        [fork_python() if fork else sys.executable, *launcher, *target, *arguments], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for a process."""
    try:
        output, errors = process.communicate(timeout=HANG_SECONDS)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def launch(module_or_file: str, *arguments: str, check: bool = True, **how: Any) -> subprocess.CompletedProcess:
    """Run a program to its end; `how` as for `start`."""
    done = finish(start(module_or_file, *arguments, **how))
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> Path:
    """Shards of 100 synthetic lesions."""
    folder = tmp_path_factory.mktemp("demo")
    launch("shards.demo", f"output={folder}/demo", "lesions=100", "test_lesions=50")
    launch("shards.pack", f"source={folder}/demo/train", f"output={folder}/shards", "short_side=null")
    return folder / "shards"
