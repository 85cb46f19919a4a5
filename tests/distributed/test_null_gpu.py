"""Training on a stub of a GPU, where one is beside the project: all host code of the CUDA paths runs."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.processes import ROOT

STUB = ROOT.parent / "shared" / "nullgpu" / "nullgpu"


def on_stub(*words) -> subprocess.CompletedProcess[str]:
    # Trainings in this process have set it.
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    return subprocess.run([STUB, sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not (STUB.exists() and shutil.which("gcc")), reason="no stub of a GPU, or no compiler to build it")
@pytest.mark.parametrize(("strategies", "mode"), [("single,ddp", "graph"), ("fsdp2", "eager")])
def test_train_stop_resume_and_predict_on_a_gpu(tmp_path, strategies, mode):
    if on_stub("-c", "import torch; assert torch.cuda.is_available()").returncode:
        pytest.skip("PyTorch does not see the stub of a GPU: this machine lacks a CUDA build or a header to build it")
    words = [f"strategies={strategies}", f"modes={mode}", "networks=trimodal"]
    done = on_stub("-m", "tests.gpu.matrix", tmp_path, *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count(f"trimodal {mode}: ok") == len(strategies.split(","))
