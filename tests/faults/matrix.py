"""Run a program, inject a fault, run it again, and compare what it wrote with an undisturbed run's."""

from __future__ import annotations

import fcntl
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

from tests.data.shards import faulty_server
from tests.faults import rows as setups
from tests.faults.compare import contents, differences
from tests.faults.injection import Plan
from tests.faults.rows import Row, command, row_of
from tests.processes import start

FAULTS = ("SIGKILL", "SIGTERM", "disk full", "read-only", "damaged input", "lost rank", "server")
HANG_SECONDS = 300.0
"""A guard; nothing depends on how long a program takes."""
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "flipped bit": lambda content: (
        content[: (at := len(content) // 2)] + bytes([content[at] ^ 4]) + content[at + 1 :] if content else b"\0"
    ),
}
NO_CHECKSUM = ("photos*", "foreign/*", "*.yaml")
"""What people write; a flipped bit in it may be another valid value."""
DDP = "accelerate_configs/ddp.yaml"


@dataclass(frozen=True)
class Variant:
    """How a program runs: on how many ranks, and whether it takes its shards from a server."""

    ranks: int = 1
    remote: bool = False


@dataclass
class Expected:
    """What an undisturbed run changed, in order, and what it left."""

    changes: list[str]
    files: dict[str, str]


@dataclass
class Outcome:
    """What came of one fault. `problems` is empty where the program behaved as it must.

    Kinds of problems: lost (the result of running again is another), silent (no or another exit status or message than
    the fault calls for), left over, hang.
    """

    row: str
    fault: str
    case: str
    status: int | None = None
    seconds: float = 0.0
    message: str = ""
    problems: list[str] = field(default_factory=list)


@dataclass
class Finished:
    status: int | None
    output: str
    errors: str

    @property
    def messages(self) -> list[str]:
        """The lines of stderr that say how the program ended; the ranks of a launcher may say the same."""
        lines = [line for line in self.errors.splitlines() if line.startswith(("error: ", "interrupted: "))]
        return list(dict.fromkeys(lines))


class Matrix:
    """The fault matrix in a scratch folder; programs run in FOLDER/place, always the same path."""

    def __init__(self, folder: Path, report: Callable[[Outcome], None] = lambda outcome: None) -> None:
        self.folder, self.place, self.scratch = folder, folder / "place", folder / "scratch"
        self.report = report
        self.expected: dict[tuple[str, Variant], Expected] = {}
        self.server: faulty_server.Server | None = None

    # --- undisturbed runs --------------------------------------------------------------------------------------------

    def undisturbed(self, row: Row, variant: Variant = Variant()) -> Expected:
        """Return what a row's program leaves without a fault; keep it as the start of other rows."""
        if (row.name, variant) not in self.expected:
            self.prepare(row)
            with self.serving(variant):
                done = self.run(row, variant, Plan(str(self.place), str(self.scratch)))
            assert done.status == 0, f"{row.name}: {done.output[-2000:]}{done.errors[-2000:]}"
            changes = (self.scratch / "changes").read_text().splitlines()
            self.expected[row.name, variant] = Expected(changes, contents(self.place))
            if variant == Variant():
                shutil.copytree(self.place, self.kept(row.name), symlinks=True)
        return self.expected[row.name, variant]

    def kept(self, name: str) -> Path:
        return self.folder / name.replace(" ", "-")

    def prepare(self, row: Row) -> None:
        """Fill the place with what the row starts from."""
        if row.after:
            self.undisturbed(row_of(row.after))
        make_writable(self.place)
        shutil.rmtree(self.place, ignore_errors=True)
        if row.after:
            shutil.copytree(self.kept(row.after), self.place, symlinks=True)
        if row.setup:
            getattr(setups, row.setup)(self.place)

    def run(self, row: Row, variant: Variant, plan: Plan, again: bool = False) -> Finished:
        """Run a row's program to its end, and wait for all its processes."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        module, *words = command(row, self.place, variant.ranks, self.url if variant.remote else "", again)
        if variant.remote:
            words += ["data.remote.stall_seconds=2", "data.remote.total_seconds=6"]
        ranks = {"config": DDP, "ranks": variant.ranks} if variant.ranks > 1 and row.ranks else {}
        process = start(module, *words, environment={**plan.environment(), **row.environment}, **ranks)
        try:
            output, errors = process.communicate(timeout=HANG_SECONDS)
            return Finished(process.returncode, output, errors)
        except subprocess.TimeoutExpired:
            process.kill()
            return Finished(None, "", "")

    # --- faults ------------------------------------------------------------------------------------------------------

    def cases(self, row: Row, fault: str, moments: int) -> Iterator[Callable[[], Outcome]]:
        """Yield the cases of a cell, each a function that runs it. moments: per cell, of those that are many."""
        if fault in ("SIGKILL", "SIGTERM", "disk full"):
            changes = self.undisturbed(row).changes
            for target in row.targets if fault != "disk full" else row.targets[:1]:
                for at in spread(changes, moments):
                    plan = replace(self.plan(at), fault="full" if fault == "disk full" else fault, target=target)
                    yield lambda plan=plan: self.fault(row, fault, moment(changes, plan), plan)
        elif fault == "read-only":
            yield lambda: self.read_only(row)
        elif fault == "damaged input":
            self.prepare(row)
            paths = [path for pattern in row.reads for path in sorted(self.place.glob(pattern))[:1]]
            cases = [(path, name) for path in dict.fromkeys(paths) for name in DAMAGES if self.noticeable(path, name)]
            for path, name in cases[:: max(1, len(cases) // (3 * moments))] if moments else cases:
                yield lambda path=path, name=name: self.damaged(row, path, name)
        elif fault == "lost rank" and (row.ranks or row.rank_words):
            variant = Variant(ranks=2)
            changes = self.undisturbed(row, variant).changes
            targets = row.lost or (f"{row.program} 1", f"{row.program} 0")
            for number, at in enumerate(spread(changes, moments, {name.split()[0] for name in targets})):
                program = changes[at - 1].split()[0]
                names = [name for name in targets if name.split()[0] == program]
                # All processes of Ray have this name, also those that free the resources of dead ones.
                target = "self" if program == "default_worker" else names[number % len(names)]
                plan = replace(self.plan(at), target=target)
                yield lambda plan=plan: self.fault(row, fault, moment(changes, plan), plan, variant)
        elif fault == "server" and row.remote:
            faults = [faulty_server.stall, faulty_server.wrong_bytes, faulty_server.silence, faulty_server.login_page]
            faults += [each for each in faulty_server.FAULTS if each not in faults]
            for each in faults[:moments] if moments else faults:
                for often in (1, 10_000):
                    yield lambda each=each, often=often: self.lying_server(row, each, often)

    def noticeable(self, path: Path, damage: str) -> bool:
        """Return whether the damage of a file can be noticed: a single bit only where the file has a checksum."""
        name = path.relative_to(self.place).as_posix()
        return damage != "flipped bit" or not any(fnmatch(name, pattern) for pattern in NO_CHECKSUM)

    def plan(self, at: int = 0) -> Plan:
        return Plan(str(self.place), str(self.scratch), at)

    def fault(self, row: Row, fault: str, case: str, plan: Plan, variant: Variant = Variant()) -> Outcome:
        """Inject a fault at a moment."""
        outcome = Outcome(row.name, fault, case)
        self.prepare(row)
        done = self.first_run(row, variant, plan, outcome)
        stopped = {"SIGTERM": {3}, "full": {2}}.get(plan.fault, {-signal.SIGKILL, 128 + signal.SIGKILL, 1, 3})
        self.check(done, stopped, plan.fault != "SIGKILL", outcome, row, variant)
        return self.run_again(row, variant, outcome)

    def read_only(self, row: Row) -> Outcome:
        """Run as a user who may not write the folders that the program writes."""
        outcome = Outcome(row.name, "read-only", ", ".join(row.writes))
        self.undisturbed(row)
        self.prepare(row)
        folders = [self.place / name for name in row.writes]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        before = contents(self.place)
        for folder in folders:
            for path in (folder, *folder.rglob("*")):
                path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o222)
        done = self.first_run(row, Variant(), replace(self.plan(), unprivileged=True), outcome)
        self.check(done, {2}, True, outcome, row)
        make_writable(self.place)
        if done.status != 0:
            outcome.problems += [f"left over: {line}" for line in differences(before, contents(self.place))]
        return self.run_again(row, Variant(), outcome)

    def damaged(self, row: Row, path: Path, damage: str) -> Outcome:
        """Damage a file that the program reads; put it back, and run again."""
        name = path.relative_to(self.place).as_posix()
        outcome = Outcome(row.name, "damaged input", f"{damage} {name}")
        self.undisturbed(row)
        self.prepare(row)
        content = path.read_bytes()
        path.write_bytes(DAMAGES[damage](content))
        bad = path.read_bytes()
        done = self.first_run(row, Variant(), self.plan(), outcome)
        if path.exists() and path.read_bytes() == bad:
            path.write_bytes(content)
        if done.status == 0 and f"photos are not in {path.name}" in done.output:
            self.report(outcome)
            return outcome  # a table that was cut between two lesions is another valid table
        self.check(done, {2}, True, outcome, row, damaged=path)
        return self.run_again(row, Variant(), outcome)

    def lying_server(self, row: Row, fault: faulty_server.Fault, often: int) -> Outcome:
        """Let the server of the shards fail, once or always, for each tar and table."""
        variant = Variant(remote=True)
        outcome = Outcome(row.name, "server", f"{fault.__name__}, {'once' if often == 1 else 'always'}")
        self.undisturbed(row, variant)
        self.prepare(row)
        with self.serving(variant) as server:
            names = {path.name for path in (*self.place.glob("train/*"), *self.place.glob("test/*"))} - {"index.json"}
            server.faults.update({name: [fault] * often for name in names})
            done = self.first_run(row, variant, self.plan(), outcome)
            self.check(done, {2}, True, outcome, row, variant)
            server.faults.clear()
            return self.run_again(row, variant, outcome)

    # --- verdicts ----------------------------------------------------------------------------------------------------

    def first_run(self, row: Row, variant: Variant, plan: Plan, outcome: Outcome) -> Finished:
        begun = time.monotonic()
        done = self.run(row, variant, plan)
        outcome.status, outcome.seconds = done.status, round(time.monotonic() - begun, 1)
        outcome.message = "; ".join(done.messages)
        if done.status is None:
            outcome.problems.append(f"hang: still running after {HANG_SECONDS:g} s")
        self.await_processes(outcome)
        return done

    def check(
        self,
        done: Finished,
        statuses: set[int],
        tells: bool,
        outcome: Outcome,
        row: Row,
        variant: Variant = Variant(),
        damaged: Path | None = None,
    ) -> None:
        """Check how the program ended: with one of the statuses and a line, or with the undisturbed result."""
        problems = outcome.problems
        if "Traceback (most recent call last)" in done.errors and tells:
            problems.append(f"silent: a traceback: {done.errors.strip().splitlines()[-1]}")
        if done.status == 0 and damaged and f"/{damaged.name}: not readable" in done.output:
            return  # of a file that is only information
        if done.status == 0:
            found = differences(self.undisturbed(row, variant).files, contents(self.place))
            problems += [f"silent: exit status 0, and {line}" for line in found]
        elif done.status is not None and done.status not in statuses:
            problems.append(f"silent: exit status {done.status}: {done.errors[-300:]}")
        elif tells and done.status is not None and len(done.messages) != 1:
            problems.append(f"silent: {len(done.messages)} lines tell why: {done.errors[-300:]}")
        elif tells and done.status == 2 and str(self.place) not in outcome.message and self.url not in outcome.message:
            problems.append(f"silent: the message names no file: {outcome.message}")

    def run_again(self, row: Row, variant: Variant, outcome: Outcome) -> Outcome:
        """Run the same command again without a fault, and compare."""
        again = bool(row.again)
        done = self.run(row, variant, self.plan(), again)
        if again and done.status == 2:  # a search that had not begun is not resumed
            done = self.run(row, variant, self.plan())
        self.await_processes(outcome)
        if done.status is None:
            outcome.problems.append(f"hang: run again, still running after {HANG_SECONDS:g} s")
        elif done.status != 0:
            refused = any("exist" in message for message in done.messages) and outcome.status == 0
            if not refused:  # an export that is there is not written again
                outcome.problems.append(f"lost: run again, status {done.status}: {done.errors[-400:]}")
        for line in differences(self.undisturbed(row, variant).files, contents(self.place)):
            outcome.problems.append(f"left over: {line}" if line.startswith("left over") else f"lost: {line}")
        self.report(outcome)
        return outcome

    def await_processes(self, outcome: Outcome) -> None:
        """Wait until no process of the command is left."""
        deadline = time.monotonic() + HANG_SECONDS
        with (self.scratch / "alive").open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        outcome.problems.append("left over: a process")
                        return
                    time.sleep(0.02)

    # --- the server --------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return self.server.url.removesuffix("/set") if self.server else "http://"

    @contextmanager
    def serving(self, variant: Variant) -> Iterator[faulty_server.Server]:
        """Serve PLACE/train and PLACE/test, at the same address each time, where the variant needs it."""
        if not variant.remote:
            with nullcontext() as nothing:
                yield nothing  # type: ignore[misc]
            return
        port = self.server.port if self.server else 0
        with faulty_server.serve(self.place, port=port, nested=True) as server:
            self.server = server
            yield server


def spread(changes: list[str], moments: int, programs: Collection[str] = ()) -> list[int]:
    """Return the numbers of changes of different kinds, evenly spread; of each kind the first. 0 moments: all kinds.

    programs: those whose changes count, by default all.
    """
    first: dict[str, int] = {}
    for number, change in enumerate(changes, 1):
        if not programs or change.split()[0] in programs:
            first.setdefault(re.sub(r"-[0-9a-f]{8}\.part|\d+", "N", change), number)
    numbers = sorted(first.values())
    if not moments or len(numbers) <= moments:
        return numbers
    return [numbers[round((k + 0.5) * len(numbers) / moments - 0.5)] for k in range(moments)]


def moment(changes: list[str], plan: Plan) -> str:
    """Describe the moment of a plan: the change before which the fault happens."""
    event, path = changes[plan.at - 1].partition("\t")[2].split(" ")[:2]
    name = Path(path).relative_to(plan.folder).as_posix() if path != plan.folder else "."
    target = "" if plan.target == "self" else f" of {plan.target}"
    return f"change {plan.at} of {len(changes)}{target}: {event} {name}"


def make_writable(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")) if folder.is_dir() else ():
        if not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) | stat.S_IWUSR)
