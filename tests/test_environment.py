"""environment.json: what a run was made with, and when its stages ran."""

import json
import threading

import pytest

from triderm_dist import cli
from triderm_dist.config import RunReader, load
from triderm_dist.environment import read_environment, record_data, record_program, this_environment


class Stage(RunReader):
    @property
    def is_stage(self) -> bool:
        return self.results == self.folder


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text("models: {a: {}}\n")
    return tmp_path


def start(main, *words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.run(Stage, main, None, list(words))
        raise SystemExit(0)
    return stop.value.code


def test_each_start_is_recorded_with_its_exit_code(run, tmp_path):
    (run / "log.txt").touch()

    def fail(error):
        def main(config):
            raise error

        return main

    assert start(lambda config: None, f"run={run}") == 0
    assert start(fail(cli.InputError("wrong")), f"run={run}") == 2
    assert start(fail(cli.Interrupted("saved")), f"run={run}") == 3
    with pytest.raises(ZeroDivisionError):
        start(fail(ZeroDivisionError()), f"run={run}")
    record = read_environment(run)
    assert [each["exit"] for each in record["starts"]] == [0, 2, 3, 1]
    assert {each["program"] for each in record["starts"]} == {"test_environment"}
    assert [each["environment"] for each in record["starts"]] == [0] * 4  # each environment is written once
    assert record["environments"] == [this_environment()]
    assert record["environments"][0]["packages"]["torch"] and record["environments"][0]["cores"]


def test_other_ranks_other_folders_and_other_outputs_record_nothing(run, tmp_path, monkeypatch):
    assert start(lambda config: None, f"run={run}", f"output={tmp_path}/elsewhere") == 0
    with record_program(tmp_path / "no-run", "stack", cli.exit_code):
        pass
    monkeypatch.setenv("RANK", "1")
    assert start(lambda config: None, f"run={run}") == 0
    assert not list(tmp_path.rglob("environment.json"))


def test_programs_in_parallel_lose_no_record(run):
    def work(number: int) -> None:
        record_data(run, f"set-{number}", {"lesions": number})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_environment(run)["data"] == {f"set-{number}": {"lesions": number} for number in range(20)}


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"format": "triderm-environment", "version": 9})])
def test_unreadable_record_is_kept_with_a_message(run, text, capsys):
    (run / "environment.json").write_text(text)
    assert read_environment(run)["starts"] == []
    with record_program(run, "stack", cli.exit_code):
        pass
    assert (run / "environment.json").read_text() == text
    assert "environment.json: not readable; restore it from a copy, or delete it" in " ".join(
        capsys.readouterr().out.split()
    )
    assert load(RunReader, None, [f"run={run}"]).folder == run
