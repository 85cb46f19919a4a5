"""A server that has imported PyTorch and this package, and forks a process per program: importing takes seconds.

`fork_python()` returns the path of an executable that accepts the arguments of `sys.executable`: `-m MODULE`,
`-c CODE` or a file. It requests a fork from the server with its arguments, environment, working folder, standard files,
limits and capabilities, forwards signals to the fork, and exits with its status. In the fork `sys.executable` is the
same executable, so that the stages of a pipeline and the ranks of a launcher are forks as well. Each imports the module
that the environment variable FORK_IMPORTS names, before the program. Two things differ from a new process: packages
have read the environment of the server while they were imported (OMP_NUM_THREADS), and modules are not torn down at
exit, which would take seconds as well.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import pkgutil
import random
import resource
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

import triderm_dist

ROOT = Path(__file__).parents[1]
IMPORTED = (
    "accelerate.commands.launch", "cv2", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.pyplot", "pyarrow.dataset", "pyarrow.parquet", "scipy.stats", "simplejpeg", "sklearn.model_selection",
    "timm", "torch.distributed.run", "torch.profiler", "torch.utils.flop_counter", "torch.utils.tensorboard",
    "torchvision", "transformers", "xgboost",
)  # fmt: skip
CLIENT = """\
#!{python} -SE
import json, os, resource, signal, socket, sys

program, pending = None, []

def forward(number, frame):
    if program is None:
        pending.append(number)
        return
    try:
        os.kill(program, number)
    except ProcessLookupError:
        pass  # it has just ended

for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), forward)
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
limits = [[number, *resource.getrlimit(number)] for name, number in vars(resource).items() if name[:7] == "RLIMIT_"]
with open("/proc/self/status") as status:
    capabilities = int(next(line for line in status if line.startswith("CapEff:")).split()[1], 16)
request = {{
    "arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd(), "limits": limits,
    "capabilities": capabilities,
}}
body = json.dumps(request).encode()
socket.send_fds(server, [b"%8d" % len(body)], [0, 1, 2])
server.sendall(body)
answers = server.makefile()
program = int(answers.readline())
for number in pending:
    forward(number, None)
status = int(answers.readline())
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def fork_python() -> str:
    """Return the path of the executable; the first call starts the server of this process."""
    return _started()[0]


def forks(title: str) -> list[int]:
    """Return the process IDs of forks whose command line starts with `title`; Ray sets the title of its workers."""
    server, found = _started()[1], []
    for pid in map(int, Path(f"/proc/{server}/task/{server}/children").read_text().split()):
        with contextlib.suppress(OSError):
            found += [pid] if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title.encode()) else []
    return found


@functools.cache
def _started() -> tuple[str, int]:
    """Start the server; return the path of the executable and the server's process ID."""
    folder = Path(tempfile.mkdtemp(prefix="fork-server-"))
    command = [sys.executable, "-m", "tests.fork_server", str(folder / "socket"), str(folder / "python")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert server.stdin and server.stdout
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.stdin.close)
    while line := server.stdout.readline():  # imports may print as well
        if line == b"serving\n":
            return str(folder / "python"), server.pid
    raise AssertionError(f"{command} ended with {server.wait()}")


class Server:
    """Forks a process for each client, sends it the exit status, and kills the process if the client dies."""

    def __init__(self, address: str, python: str) -> None:
        self.python, self.path = python, sys.path[1:]
        Path(python).write_text(CLIENT.format(python=sys.executable, address=address))
        Path(python).chmod(0o755)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen()
        self.child_ended, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wakeup.fileno())
        self.files = [self.listener, self.child_ended, wakeup]
        self.clients: dict[int, socket.socket] = {}

    def serve(self) -> None:
        """Serve until standard input is closed, which the parent process does at its exit."""
        while True:
            clients = {client: pid for pid, client in self.clients.items()}
            ready, _, _ = select.select([sys.stdin, self.listener, self.child_ended, *clients], [], [])
            if sys.stdin in ready:
                return
            for client in clients.keys() & set(ready):  # end of file: a client sends nothing after its request
                os.kill(clients[client], signal.SIGKILL)
                self._report(clients[client], 0)
            if self.child_ended in ready:
                self.child_ended.recv(4096)
                self._report_ended()
            if self.listener in ready:
                self._fork()

    def _fork(self) -> None:
        client, _ = self.listener.accept()
        length, files, _, _ = socket.recv_fds(client, 8, 3)
        try:
            request = json.loads(client.recv(int(length), socket.MSG_WAITALL))
        except (OSError, ValueError):  # the client was killed
            client.close()
            return
        pid = os.fork()
        if pid == 0:
            for file in (*self.files, *self.clients.values(), client):
                file.close()
            run_program(request, files, self.python, self.path)
        for number in files:
            os.close(number)
        self.clients[pid] = client
        with contextlib.suppress(OSError):
            client.sendall(f"{pid}\n".encode())

    def _report_ended(self) -> None:
        """Reap the ended children and send their exit status to the living clients."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] in self.clients:
                    self._report(ended[0], os.waitstatus_to_exitcode(ended[1]))

    def _report(self, pid: int, status: int) -> None:
        with self.clients.pop(pid) as client, contextlib.suppress(OSError):
            client.sendall(f"{status}\n".encode())


def run_program(request: dict[str, Any], files: list[int], python: str, path: list[str]) -> NoReturn:
    """Run `python ARGUMENTS` in this fork, and exit with its status."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the server
    os.setpgid(0, 0)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    for number, *limits in request["limits"]:
        resource.setrlimit(number, tuple(limits))
    limit_capabilities(request["capabilities"])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    random.seed()
    arguments = request["arguments"]
    sys.orig_argv = [python, *arguments]
    if arguments[0] == "-u":
        arguments.pop(0)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    more = os.environ.get("PYTHONPATH")
    script = "" if arguments[0].startswith("-") else os.path.dirname(os.path.abspath(arguments[0]))
    sys.path[:] = [script or os.getcwd(), *(more.split(os.pathsep) if more else ()), *path]
    sys.executable, sys.orig_argv = python, [python, *request["arguments"]]
    sys.argv = arguments if script else arguments[1:]
    status = 0
    try:
        if module := os.environ.get("FORK_IMPORTS"):
            importlib.import_module(module)
        if script:
            runpy.run_path(arguments[0], run_name="__main__")
        elif arguments[0] == "-m":
            sys.modules.pop(arguments[1], None)  # runpy warns where it is imported already
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            assert arguments[0] == "-c"
            sys.argv[0] = "-c"
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else end.code is not None
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:  # an exit handler may close it, which Python does not mind either
            stream.flush()
    os._exit(status)


def limit_capabilities(allowed: int) -> None:
    """Take from this process, and from programs that it starts, the capabilities of root that are not in this mask."""
    libc = ctypes.CDLL(None, use_errno=True)
    for number in range(64):
        if not allowed >> number & 1:
            libc.prctl(24, number)  # PR_CAPBSET_DROP
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for at in range(6):  # effective, permitted and inheritable capabilities up to 31, then the others
        sets[at] &= allowed >> 32 * (at // 3) & 0xFFFFFFFF
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def modules() -> list[str]:
    """Return the names of the modules of this package."""
    found = pkgutil.walk_packages(triderm_dist.__path__, "triderm_dist.")
    return [module.name for module in found if not module.name.endswith("__main__")]


def main(address: str, python: str) -> None:
    gc.disable()
    for name in (*IMPORTED, *modules()):
        with contextlib.suppress(ModuleNotFoundError):  # of an extra
            importlib.import_module(name)
    assert threading.active_count() == 1, f"imports started {threading.enumerate()}: threads do not survive a fork"
    gc.freeze()  # forks neither scan imported objects nor copy their pages
    gc.enable()
    server = Server(address, python)
    print("serving", flush=True)
    server.serve()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
