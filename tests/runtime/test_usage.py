"""CPU time, memory and waits of a program that another one starts."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from triderm_dist.runtime import usage
from triderm_dist.runtime.usage import USAGE_FILE, Meter, Usage, usage_table


def measured(code: str, folder) -> tuple[int, Usage]:
    report = folder / "usage.json"
    meter = Meter(report)
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, USAGE_FILE: str(report)})
    status, used = meter.wait(process)
    assert not report.exists()
    return status, used


def test_cpu_time_memory_and_waits_of_a_process_and_its_children(tmp_path):
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    code = (
        f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {burn!r}])\n"
        "block = bytearray(200 << 20)\n"
        "from triderm_dist.runtime.usage import add_data_wait, report_usage\n"
        "time.sleep(0.4); add_data_wait(0.25); report_usage(); sys.exit(5)"
    )
    status, used = measured(code, tmp_path)
    assert status == 5
    assert used.cpu_seconds >= 0.3 and used.seconds >= 0.7 and used.peak_mb >= 200
    assert used.data_seconds == 0.25
    # Asleep and waiting for the child: no time of its main thread, whatever else the machine does.
    assert (used.disk_seconds or 0.0) + used.other_seconds >= 0.4 - 0.25 + 0.3


def test_children_of_a_fork_server_are_counted(tmp_path):
    code = (
        "from triderm_dist.ensemble.stacker_process import run_in_child\n"
        "from triderm_dist.runtime import usage\n"
        "from tests.runtime.test_usage import burn\n"
        "if __name__ == '__main__':\n"
        "    run_in_child(burn)\n"
        "    assert usage._running_children_cpu_seconds() >= 0.5  # beside those of this process\n"
        "    usage.report_usage()"
    )
    (tmp_path / "program.py").write_text(code)
    status, used = measured(
        f"import runpy; runpy.run_path({str(tmp_path / 'program.py')!r}, run_name='__main__')", tmp_path
    )
    assert status == 0 and used.cpu_seconds >= 0.5 and used.peak_mb >= 300


def burn() -> int:
    """Take half a second of CPU time and 300 MiB."""
    block = bytearray(300 << 20)
    while time.process_time() < 0.5:
        pass
    return len(block)


def test_peak_memory_is_not_that_of_the_parent(tmp_path):
    block = bytearray(400 << 20)
    _, used = measured("from triderm_dist.runtime.usage import report_usage; report_usage()", tmp_path)
    assert 5 < used.peak_mb < len(block) / 2**20


def test_program_that_reports_nothing_has_no_waits(tmp_path):
    status, used = measured("pass", tmp_path)
    assert status == 0 and used.peak_mb > 1
    assert used.data_seconds is used.disk_seconds is used.other_seconds is None


def test_other_ranks_report_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(USAGE_FILE, str(tmp_path / "usage.json"))
    monkeypatch.setenv("RANK", "1")
    usage.report_usage()
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "0")
    usage.report_usage()
    assert (tmp_path / "usage.json").exists()


def test_disk_waits_are_unknown_without_pressure_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(usage, "_PRESSURE", tmp_path / "none")
    _, used = measured("from triderm_dist.runtime.usage import report_usage; report_usage()", tmp_path)
    assert used.disk_seconds is None and used.other_seconds is not None
    pressure = tmp_path / "io"
    pressure.write_text("some avg10=0.08 avg60=0.11 avg300=0.39 total=1500000\nfull avg10=0.00 total=7\n")
    monkeypatch.setattr(usage, "_PRESSURE", pressure)
    assert usage._disk_stalls() == 1.5


def test_process_that_a_signal_handler_awaited(tmp_path):
    meter = Meter(tmp_path / "usage.json")
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process.wait()
    assert meter.wait(process) == (3, None)


def test_table_has_the_sum_of_all_stages():
    rows = [("pack", Usage(4.0, 2.0, 100.0, 1.0, 0.25, 0.5)), ("other program", Usage(1.0, 2.0, 300.0))]
    assert usage_table(rows).splitlines() == [
        "stage          CPU s  wall s  cores  peak MB  data s  disk s  other s",
        "pack             4.0     2.0    2.0      100     1.0     0.2      0.5",
        "other program    1.0     2.0    0.5      300",
        "all              5.0     4.0    1.2      300",
    ]
    assert max(map(len, usage_table(rows).splitlines())) <= 80


@pytest.fixture(autouse=True)
def no_file(monkeypatch):
    monkeypatch.delenv(USAGE_FILE, raising=False)


def test_child_whose_name_is_cut_within_a_character(tmp_path):
    program = tmp_path / ("ä" * 8)  # the kernel keeps 15 of the 16 bytes
    program.symlink_to(os.path.realpath(sys.executable))
    with subprocess.Popen([program, "-c", "import time; time.sleep(100)"]) as child:
        try:
            while os.fsencode(program.name)[:15] not in Path(f"/proc/{child.pid}/stat").read_bytes():
                time.sleep(0.01)
            assert usage._running_children_cpu_seconds() >= 0
        finally:
            child.kill()
