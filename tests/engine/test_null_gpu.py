"""Tests of a GPU without one: a program stands in for its driver, whose kernels compute nothing.

It is beside the project on some machines. What does not depend on values is tested there: that a step waits for
nothing, that a micro-batch halves where memory runs out, and that the peak of a step is the estimated one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.processes import HANG_SECONDS, ROOT

NULL_GPU = ROOT.parent / "shared" / "nullgpu" / "nullgpu"
TESTS = (
    "test_step.py::test_neither_step_nor_loader_waits_for_the_device",
    "test_memory.py::test_micro_batch_halves_where_memory_runs_out",
    "test_memory.py::test_peak_is_within_a_tenth_of_the_estimate",
)


@pytest.mark.slow
@pytest.mark.skipif(not (NULL_GPU.exists() and shutil.which("gcc")), reason="needs shared/nullgpu beside the project")
def test_step_without_waits_and_memory_as_estimated() -> None:
    # Trainings of other tests on a CPU have set variables for Accelerate in this process.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
    command = [str(NULL_GPU), sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(
        [*command, *(f"tests/gpu/{name}" for name in TESTS)],
        cwd=ROOT, env={**plain, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=HANG_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
