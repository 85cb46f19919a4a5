"""Every command in README, docs, program headers and launcher files parses: its program, options, settings and files
exist. No command is run.
"""

import importlib
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from tests.faults.rows import ROWS
from triderm_dist import cli, commands
from triderm_dist.commands.config import KINDS
from triderm_dist.commands.ranks import expand_names
from triderm_dist.config import Experiment, find_file, shipped_names

ROOT = Path(__file__).parents[1]
DOCUMENTED = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *(
        path
        for folder in ("triderm_dist/commands", "launch", "tune", "accelerate_configs")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".sh", ".yaml", ".md")
    ),
]
COMMAND = re.compile(
    r"""(?:^|: |`|\$\(|")
    ((?:[A-Z_]+=\S+\ )*(?:triderm(?=\ [a-z])|python\ -m|accelerate\ launch(?=\ -)|sbatch)\ [^`"\n]+)""",
    re.M | re.X,
)
# Placeholders: a word that starts with a capital, or a path that another command creates.
PLACEHOLDER = re.compile(r"([A-Z]|runs/|\.\.\.$)")
NUMBERS = {"RANK": "0", "NODES": "2", "GPUS_IN_ALL": "16", "HOST": "localhost", "$(INDEX)": "0"}
BATCH_SCRIPTS = {
    "launch/slurm/train.sh": ([], []),
    "launch/slurm/folds.sh": (["train"], ["fold=0"]),
    "launch/slurm/sweep.sh": (["search"], ["resume=true", "search.address=localhost:1"]),
}


def commands_in(path: Path) -> list[str]:
    """Return the commands in a file, in shell scripts those in comments, with continued lines joined."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".sh":
        lines = [line for line in lines if line.startswith("#")]
    lines = [re.sub(r"^[#\s]+", "", line) for line in lines]
    text = re.sub(r"\\\n", "", "\n".join(lines))
    found = [match.strip().rstrip(")") for match in COMMAND.findall(text)]
    found = [command for command in found if "${" not in command]  # part of a script
    return [command for command in found if "..." not in command or command.endswith("--config ...")]


def commands_of_pods() -> list[list[str]]:
    """Return the commands of the Kubernetes files."""
    found = []
    for path in sorted((ROOT / "launch" / "kubernetes").glob("*.yaml")):
        for manifest in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if manifest["kind"] == "Job":
                (container,) = manifest["spec"]["template"]["spec"]["containers"]
                found.append([*container["command"], *container["args"]])
            elif manifest["kind"] == "RayJob":
                _, _, search = manifest["spec"]["entrypoint"].partition("exec ")
                found.append(shlex.split(search.replace("$more'", "resume=true")))
    return found


def documented_commands() -> list[tuple[str, list[str]]]:
    typed = [(path, shlex.split(command)) for path in DOCUMENTED for command in commands_in(path)]
    named = [(str(path.relative_to(ROOT)), words) for path, words in typed]
    return named + [("launch/kubernetes", words) for words in commands_of_pods()]


def check_launcher(options: list[str]) -> tuple[str, list[str]]:
    """Parse `accelerate launch OPTIONS`; return the program and its arguments."""
    words = expand_names([NUMBERS.get(word, word) for word in options])
    parsed = launch_command_parser().parse_args(words)
    file = parsed.config_file
    assert (ROOT / file).is_file() or Path(file).stem in shipped_names("accelerate_configs"), file
    assert parsed.module, "programs are started by -m"
    return parsed.training_script, parsed.training_script_args


def program_name(module: str) -> str:
    """Return the name of a program, such as `train` for launch.train and triderm_dist.commands.train."""
    folder, _, name = module.rpartition(".")
    if module == "tests.faults":
        return module
    assert (ROOT / folder.replace(".", "/") / f"{name}.py").is_file(), f"{module} is not a program"
    return "synthetic" if module == "shards.demo" else name


def check_program(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the program accepts the settings, and that referenced files of the repository exist."""
    name = program_name(module)
    if name == "tests.faults":
        settings = dict(word.split("=", 1) for word in arguments)
        assert settings.keys() <= {"rows", "faults", "moments", "write", "keep", "read"}
        assert settings.get("rows", "crossval") in [row.name for row in ROWS]
        return
    assert module.startswith("benchmarks.") or name in commands.names(), f"{module} is not a program"
    if name == "config":
        assert arguments == ["list"] or any(arguments[1] in shipped_names(kind) for kind in KINDS), arguments
        return
    if name == "task":
        program = importlib.import_module("triderm_dist.commands.task")
        for verb in ("init", "check"):
            monkeypatch.setattr(program, verb, lambda *arguments: None)
        if arguments not in (["init"], ["check"]):  # named in a sentence
            program.main(arguments)
        return
    arguments = list(arguments)
    for position, word in enumerate(arguments):
        if word == "--config" and PLACEHOLDER.match(arguments[position + 1]):
            arguments[position + 1] = "milk10k"
        value = word.partition("=")[2]
        if value.endswith((".yaml", ".py")) and not PLACEHOLDER.match(value):
            assert (ROOT / value).is_file(), value
    taken = []

    def take(kind, main, about, argv=None, users=None, locate=str, first=None, on_ranks=None):
        if first:
            arguments[:] = cli.with_first(kind, arguments, first)
        a_run = re.compile(r"run=([A-Z]|runs/|.*\.zip$)")
        of_run = issubclass(kind, Experiment) and any(map(a_run.match, arguments))
        words = [word for word in arguments if not (of_run and word.startswith("run="))]
        taken.append(cli.read_settings(kind, ["--config", "milk10k", *words] if of_run else words))

    if module.startswith("benchmarks."):
        monkeypatch.setattr(cli, "run", take)
        monkeypatch.delitem(sys.modules, module, raising=False)
        runpy.run_module(module, run_name="__main__", alter_sys=True)  # pydantic looks up names in sys.modules
    else:
        program = importlib.import_module(f"triderm_dist.commands.{name}")
        monkeypatch.setattr(program, "run", take)
        program.start()
    assert taken, f"{module} reads no settings"


@pytest.mark.parametrize(
    ("where", "words"), documented_commands(), ids=lambda value: value if isinstance(value, str) else "-"
)
def test_documented_command_parses(where, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        assert name == "LAUNCHER" and find_file("accelerate_configs", value).is_file()
    if len(words) == 2 and words[0] == "triderm":  # a program mentioned in a sentence
        assert words[1] in commands.names()
        return
    if words[0] == "sbatch":
        script = next(position for position, word in enumerate(words) if position and not word.startswith("--"))
        before, after = BATCH_SCRIPTS[words[script]]
        assert (ROOT / words[script]).is_file()
        program, *arguments = [*before, *words[script + 1 :], *after]
        _, program = expand_names(["-m", program])
    elif words[:2] == ["accelerate", "launch"] or words[:2] == ["triderm", "ranks"]:
        program, arguments = check_launcher(words[2:])
    elif words[:3] == ["python", "-m", "launch.ranks"]:
        program, arguments = check_launcher(words[3:])
    elif words[0] == "triderm":
        program, arguments = f"triderm_dist.commands.{words[1]}", words[2:]
    else:
        program, arguments = words[2], words[3:]
    check_program(program, arguments, monkeypatch)


def test_commands_are_found_in_every_source():
    """Guard against a change of formatting that hides commands from the test above."""
    counts = Counter(where for where, _ in documented_commands())
    assert counts["README.md"] >= 9 and counts["launch/kubernetes"] == 3
    for name in commands.names():
        assert counts[f"triderm_dist/commands/{name}.py"] >= 1, name
    for script in BATCH_SCRIPTS:
        assert counts[script] >= 1


@pytest.mark.parametrize("program", ["triderm_dist", "launch.train"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_during_imports_exits_with_3(program, number):
    """The signal arrives at the first import of pydantic, before the settings are read."""
    code = (
        "import builtins, os, runpy, sys\n"
        "plain = builtins.__import__\n"
        "def hook(name, *rest, **more):\n"
        f"    name == 'pydantic' and os.kill(os.getpid(), {int(number)})\n"
        "    return plain(name, *rest, **more)\n"
        "builtins.__import__ = hook\n"
        "sys.argv = ['program', 'train', 'fold=0']\n"
        f"runpy.run_module({program!r}, run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "interrupted: rerun the same command to resume\n")
