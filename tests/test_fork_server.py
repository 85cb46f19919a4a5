"""A fork of the server behaves like a new Python process."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fork_server import fork_python, forks
from tests.processes import HANG_SECONDS, drop_root, wait_for

ABOUT = """
import json, os, resource, sys
limits = resource.getrlimit(resource.RLIMIT_CORE)
json.dump([sys.argv, os.getcwd(), os.environ["VALUE"], sys.executable, limits], sys.stdout)
print(sys.stdin.read(), file=sys.stderr)
"""


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([fork_python(), *arguments], capture_output=True, text=True, timeout=HANG_SECONDS, **options)


@pytest.mark.parametrize("kind", ["code", "file", "module"])
def test_fork_has_its_own_arguments_environment_folder_and_files(tmp_path, kind):
    (tmp_path / "about.py").write_text(ABOUT)
    program = {"code": ["-c", ABOUT], "file": [str(tmp_path / "about.py")], "module": ["-m", "about"]}[kind]
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    done = run(
        *program,
        "a",
        "b c",
        cwd=tmp_path,
        env={**os.environ, "VALUE": "x=y"},
        input="words",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, limits[1])),
    )
    arguments, *others = json.loads(done.stdout)
    assert arguments == [{"code": "-c"}.get(kind, str(tmp_path / "about.py")), "a", "b c"]
    assert others == [str(tmp_path), "x=y", fork_python(), [0, limits[1]]]
    assert done.returncode == 0 and done.stderr == "words\n"


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import os; os.abort()", -signal.SIGABRT, ""),
        ("import atexit; atexit.register(print, 'end', flush=True); print('begin')", 0, ""),
    ],
)
def test_fork_exits_with_the_status_of_the_program(code, status, error):
    done, real = run("-c", code), subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == real.returncode == status
    assert done.stdout == real.stdout and done.stderr.endswith(error) and real.stderr.endswith(error)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to lose")
def test_fork_has_the_rights_of_its_client(tmp_path):
    (tmp_path / "file").touch(0o400)
    write = f"open({str(tmp_path / 'file')!r}, 'w')"
    nested = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {write!r}]).returncode)"
    for code in (write, nested):
        assert run("-c", code).returncode == 0
        done = run("-c", code, preexec_fn=drop_root)
        assert done.returncode == 1 and "PermissionError" in done.stderr


def test_signals_are_forwarded_to_the_program(tmp_path):
    code = (
        f"import pathlib, signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))\n"
        f"pathlib.Path(r'{tmp_path}/ready').touch(); signal.pause()"
    )
    with subprocess.Popen([fork_python(), "-c", code]) as process:
        wait_for((tmp_path / "ready").exists, process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(HANG_SECONDS) == 7


def test_program_is_killed_with_its_client(tmp_path):
    code = (
        f"import os, pathlib, signal; pathlib.Path(r'{tmp_path}/pid').write_text(f'{{os.getpid()}}.'); signal.pause()"
    )
    with subprocess.Popen([fork_python(), "-c", code]) as process:
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("."), process)
        pid = int((tmp_path / "pid").read_text()[:-1])
        assert pid in forks("")
        process.kill()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    assert run("-c", "print('served')").stdout == "served\n"


def test_sys_executable_in_a_fork_starts_a_fork():
    code = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import sys; print(\"torch\" in sys.modules)'])"
    )
    assert run("-c", code).stdout == "True\n"
