"""Findings of the doctor on GPUs, shared memory, disks and clocks."""

import os
import subprocess
import sys
import time

import pytest

from tests.processes import HANG_SECONDS, ROOT
from triderm_dist.doctor.machine import _clock, _disk, no_gpu


def test_cpu_build_of_torch_on_a_gpu_machine_is_reported():
    assert no_gpu(None, driver=False, device=False).state == "ok"
    cpu_build = no_gpu(None, driver=True, device=True)
    assert cpu_build.state == "error" and "CPU build" in cpu_build.text and "CUDA" in cpu_build.advice
    old_driver = no_gpu("13.0", driver=True, device=True)
    assert old_driver.state == "error" and "CUDA 13.0" in old_driver.text and "driver" in old_driver.advice
    assert no_gpu(None, driver=True, device=True, visible="").state == "ok"
    no_device = no_gpu("13.0", driver=True, device=False)
    assert no_device.state == "warning" and "--gpus all" in no_device.advice


def test_too_little_shared_memory_is_reported():
    code = (
        "from triderm_dist.doctor.machine import shared_memory\n"
        "small = shared_memory(gpus=2)\n"
        "assert small.state == 'error' and small.text.startswith('64 MiB') and '--shm-size' in small.advice, small\n"
        "assert shared_memory(gpus=1) is None"
    )
    # In a separate mount namespace, with the default size in Docker containers.
    inside = 'mount -t tmpfs -o size=64m tmpfs /dev/shm || exit 77; exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", inside, "sh", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no mount namespaces for this user")
    assert done.returncode == 0, done.stderr


def test_output_path_that_is_a_file_is_reported(tmp_path):
    (tmp_path / "run").touch()
    for output in (tmp_path / "run", tmp_path / "run" / "below"):
        found = _disk(output)
        assert found.state == "error" and found.text == f"{tmp_path}/run is a file"
    assert _disk(tmp_path / "new" / "run").state == "ok"


def test_clock_behind_a_file_time_is_reported(tmp_path):
    file = tmp_path / "index.json"
    file.touch()
    assert _clock([file]).state == "ok"
    os.utime(file, (time.time() + 3600,) * 2)
    late = _clock([file, tmp_path / "none"])
    assert late.state == "warning" and "index.json was written at" in late.text
