"""The command line shared by all programs."""

import re
import socket
import subprocess
import sys

import pytest
import yaml
from pydantic import Field

from tests.processes import HANG_SECONDS, ROOT
from triderm_dist import cli
from triderm_dist.config import Experiment, load
from triderm_dist.runtime.signals import BAD_INPUT
from triderm_dist.schema import ConfigError, InputError
from triderm_dist.settings import Section


class Program(Experiment):
    uses = ("output", "models", "train")
    own: int = Field(1, description="a setting of this program")


class Small(Section):
    output: str = Field(description="a folder")


def run(kind: type[Section], *words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run a program that prints its settings; return its exit code, output and errors."""
    code = 0
    try:
        cli.run(kind, print, "A program.", list(words), users=lambda key: ["train", "report"])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


@pytest.mark.parametrize("words", [["seed=3"], ["data.test=/nope"], ["data={test: /nope}"], ["stack.max_depth=3"]])
def test_setting_without_effect_is_refused_naming_its_programs(words, capsys):
    code, _, error = run(Program, *words, capsys=capsys)
    key = words[0].partition("=")[0]
    assert code == BAD_INPUT and error.count("\n") == 1
    assert error.startswith(f"error: {key}") and "programs that use it: train, report" in error


@pytest.mark.parametrize("words", [["own=3"], ["output=x"], ["models.a.width=64"], ["train={epochs: 3}"]])
def test_settings_with_effect_are_accepted(words, capsys):
    assert run(Program, *words, capsys=capsys)[0] == 0


def test_config_file_may_hold_settings_of_other_programs(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("seed: 3\ndata: {test: /nope}\n")
    assert run(Program, "--config", str(tmp_path / "a.yaml"), capsys=capsys)[0] == 0


def test_unknown_setting_is_reported_before_one_without_effect(capsys):
    assert "did you mean 'train.epochs'" in run(Program, "seed=3", "train.epoch=3", capsys=capsys)[2]


def test_help_lists_the_settings_of_the_program_first(capsys):
    code, text, _ = run(Program, "--help", capsys=capsys)
    assert code == 0
    assert text.index("  own  (integer, default 1)") < text.index("  output  (path, default runs/default)")
    assert "train.epochs  (integer >= 1, default 60)" in text and "models.NAME.train.KEY" in text
    assert "data.source" not in text and "models.NAME.train.epochs" not in text
    assert "tuple" not in text and "Annotated" not in text and "None" not in text


def test_help_all_lists_every_setting(capsys):
    text = run(Program, "--help-all", capsys=capsys)[1]
    assert "data.source" in text and "models.NAME.train.epochs" in text
    assert not {"tuple[", "Annotated", "None", "Union"} & set(text.split())


def test_required_settings_are_marked(capsys):
    assert "  output  (text, required)" in run(Small, "--help", capsys=capsys)[1]


def test_print_config_prints_what_load_reads_back(tmp_path, capsys):
    code, text, _ = run(Program, "train.epochs=3", "--print-config", "models.a.width=64", capsys=capsys)
    (tmp_path / "a.yaml").write_text(text)
    assert code == 0 and yaml.safe_load(text)["train"]["epochs"] == 3
    assert load(Program, tmp_path / "a.yaml") == load(Program, None, ["train.epochs=3", "models.a.width=64"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config"], "--config needs a YAML file after it"),
        (["--config", "a.yaml", "--config=b.yaml"], "--config is given twice; write `base: FILE` in one file"),
        (["--verbose"], "unknown option --verbose; options are --config FILE, --print-config, --help and --help-all"),
        (["-x"], "unknown option -x"),
    ],
)
def test_invalid_options_give_one_line(words, message):
    with pytest.raises(InputError, match=message):
        cli.read_settings(Small, words)


def test_a_file_as_the_folder_of_a_run_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("")
    with pytest.raises(InputError, match=r"output: .*a\.py: is a file; name a folder"):
        cli.check_writable(load(Experiment, None, [f"output={tmp_path / 'a.py'}"]))


def test_config_option_accepts_a_space_or_an_equals_sign(tmp_path):
    (tmp_path / "a.yaml").write_text("output: x\n")
    file = str(tmp_path / "a.yaml")
    assert cli.read_settings(Small, ["--config", file]) == cli.read_settings(Small, [f"--config={file}"])


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("wrong"), 2, "error: wrong\n"),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "error: x: No such file or directory\n"),
        (OSError("no\nnetwork"), 2, "error: no network\n"),
        (cli.Interrupted("saved"), 3, "interrupted: saved\n"),
        (KeyboardInterrupt(), 3, "interrupted: rerun the same command to resume\n"),
    ],
)
def test_each_error_has_its_exit_code_and_one_line(error, code, text, capsys):
    def work() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run_with_exit_codes(work)
    assert (stop.value.code, capsys.readouterr().err) == (code, text)


def test_an_error_is_printed_by_one_write():
    # The ranks of a machine share its stderr: lines written in two parts would mix.
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with receiver, sender:
        command = [sys.executable, "-m", "triderm_dist", "train", "output="]
        subprocess.run(command, cwd=ROOT, stderr=sender, timeout=HANG_SECONDS)
        packet = receiver.recv(1 << 12).decode()
    assert packet == "error: output: no value after '='; write output=VALUE\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "data.test=/nope"], "data.test: this program does not use the setting; programs that use it: "),
        (["report", "train.epochs=99"], "train.epochs: .* programs that use it: .*pipeline, train, crossval"),
        (["stack", "output="], "output: no value after '='"),
        (["trian"], "did you mean 'train'"),
    ],
)
def test_programs_reject_invalid_settings_in_one_line(words, message):
    done = subprocess.run(
        [sys.executable, "-m", "triderm_dist", *words], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.search(message, done.stderr), done.stderr


RANK = """
import atexit, sys, torch, torch.distributed as dist
from triderm_dist import cli

def work():
    atexit.register(print, "exit handler")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for _ in range(100):
        dist.all_reduce(torch.ones(1_000_000), async_op=True)
    if sys.argv[1:]:
        raise cli.Interrupted("saved")

cli.run_with_exit_codes(work)
"""


@pytest.mark.parametrize(("words", "status"), [([], 0), (["stop"], 3)])
def test_a_rank_exits_while_gloo_releases_tensors(words, status):
    # Finalizing Python then aborts the process, in most tries.
    command = [sys.executable, "-c", RANK, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert (done.returncode, done.stdout) == (status, "exit handler\n"), done.stderr
