"""Stages run once for the same content and again when it changes; one run at a time per folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.data.readers.test_lesions_csv import PER_PHOTO, rows_of_photos, task_of, write
from tests.processes import HANG_SECONDS, ROOT, is_free, wait_for
from triderm_dist.commands.pipeline import PipelineRun, stages
from triderm_dist.config import Experiment, load, save
from triderm_dist.environment import read_environment
from triderm_dist.schema import Busy, ConfigError, DataError
from triderm_dist.stages import Stage, _digest, run_stages
from triderm_dist.tasks import load_task


def stage(folder: Path, settings: object = 0, name: str = "copy") -> Stage:
    code = f"open(r'{folder}/out', 'a').write(open(r'{folder}/in').read())"
    return Stage(name, ["python", "-c", code], settings, [folder / "in"], [folder / "out"])


def test_stage_reruns_by_content_instead_of_time(tmp_path):
    (tmp_path / "in").write_text("a")
    run_stages([stage(tmp_path)], tmp_path)
    (tmp_path / "in").write_text("a")
    run_stages([stage(tmp_path)], tmp_path)
    assert (tmp_path / "out").read_text() == "a"
    (tmp_path / "in").write_text("b")
    run_stages([stage(tmp_path)], tmp_path)
    assert (tmp_path / "out").read_text() == "ab"
    run_stages([stage(tmp_path, settings=1)], tmp_path)
    assert (tmp_path / "out").read_text() == "abb"
    (tmp_path / "out").unlink()
    run_stages([stage(tmp_path, settings=1)], tmp_path)
    assert (tmp_path / "out").read_text() == "b"
    (tmp_path / "out").write_text("by another program:")
    for _ in range(2):
        run_stages([stage(tmp_path, settings=1)], tmp_path)
    assert (tmp_path / "out").read_text() == "by another program:b"


def test_usage_of_each_stage_that_was_run_is_returned_and_recorded(tmp_path):
    (tmp_path / "in").write_text("a")
    ((name, used),) = run_stages([stage(tmp_path)], tmp_path)
    assert name == "copy" and used.seconds > 0 and used.peak_mb > 1 and used.data_seconds is None
    assert not (tmp_path / "environment.json").exists()  # not the folder of a run
    (tmp_path / "config.yaml").touch()
    both = run_stages([stage(tmp_path), stage(tmp_path, name="again")], tmp_path)
    assert [name for name, _ in both] == ["again"]
    run_stages([stage(tmp_path, settings=1)], tmp_path)
    recorded = read_environment(tmp_path)["stages"]
    assert [row["stage"] for row in recorded] == ["again", "copy"]
    assert recorded[0]["cpu_seconds"] == round(both[0][1].cpu_seconds, 2) and recorded[0]["other_seconds"] is None


def test_folders_in_a_ring_of_links_are_hashed_once(tmp_path):
    photos = tmp_path / "photos"
    (photos / "a").mkdir(parents=True)
    (photos / "a" / "photo.jpg").write_bytes(b"photo")
    first = _digest([photos])
    for name in ("ring", "again"):
        (photos / name).symlink_to(photos)
        (photos / "a" / name).symlink_to(photos / "a")
    assert _digest([photos]) == first
    (photos / "nowhere.csv").symlink_to("absent")
    assert _digest([photos]) != first


def test_damaged_record_is_reported_and_all_stages_rerun(tmp_path, capsys):
    (tmp_path / "in").write_text("a")
    run_stages([stage(tmp_path)], tmp_path)
    record = (tmp_path / "stages.json").read_text()
    (tmp_path / "stages.json").write_text(record[: len(record) // 2])
    run_stages([stage(tmp_path)], tmp_path)
    assert (tmp_path / "out").read_text() == "aa" and (tmp_path / "stages.json").read_text() != record[
        : len(record) // 2
    ]
    assert "stages.json: not readable; all stages run again" in capsys.readouterr().out


def test_moved_run_skips_its_stages(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "in").write_text("a")
    monkeypatch.chdir(tmp_path)
    run_stages([stage(Path("run"))], Path("run"))
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    capsys.readouterr()
    run_stages([stage(tmp_path / "moved")], tmp_path / "moved")
    assert "skipped, inputs unchanged" in capsys.readouterr().out


def test_record_of_a_former_version_is_accepted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_text("a")
    (tmp_path / "out").write_text("b")
    one = replace(stage(Path(".")), former_settings=["typed/path"])
    digests = [_digest([["typed/path"], Path("in")]), _digest([Path("out")])]
    (tmp_path / "stages.json").write_text(json.dumps({one.name: digests}))
    run_stages([one], Path("."))
    assert "skipped, inputs unchanged" in capsys.readouterr().out
    assert json.loads((tmp_path / "stages.json").read_text()) != {one.name: digests}
    (tmp_path / "stages.json").write_text(json.dumps({one.name: digests}))
    run_stages([replace(one, former_settings=["other/path"])], Path("."))
    assert "skipped, inputs unchanged" not in capsys.readouterr().out


def test_folder_hash_covers_names_sizes_and_tables(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "photo.jpg").write_bytes(b"123")
    (source / "table.csv").write_text("a,b\n")
    count = tmp_path / "count"
    one = Stage("n", ["python", "-c", f"open(r'{count}', 'a').write('x')"], None, [source], [count])

    def runs() -> int:
        run_stages([one], tmp_path / "run")
        return len(count.read_text())

    assert (runs(), runs()) == (1, 1)
    (source / "table.csv").write_text("a,c\n")
    assert (runs(), runs()) == (2, 2)
    (source / "photo2.jpg").write_bytes(b"123")
    assert (runs(), runs()) == (3, 3)


def test_failed_stage_ends_the_run_with_its_status(tmp_path):
    (tmp_path / "in").write_text("a")
    failing = Stage("fail", ["python", "-c", "raise SystemExit(2)"], 0, [], [])
    with pytest.raises(SystemExit) as stop:
        run_stages([failing, stage(tmp_path)], tmp_path)
    assert stop.value.code == 2
    assert not (tmp_path / "out").exists()
    run_stages([stage(tmp_path)], tmp_path)
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stop_signal_is_forwarded_once_and_the_stage_is_awaited(tmp_path, number):
    saves = (
        "import signal, sys, time; from pathlib import Path\n"
        f"def save(*_): time.sleep(0.5); open(r'{tmp_path}/saved', 'a').write('x'); time.sleep(0.5); "
        "sys.exit(print('interrupted: saved', file=sys.stderr) or 3)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"Path(r'{tmp_path}/begun').touch(); time.sleep({HANG_SECONDS})"
    )
    code = (
        "from pathlib import Path; from triderm_dist import cli; from triderm_dist.settings import Section\n"
        "from triderm_dist.stages import Stage, _digest, run_stages\n"
        f"stages = [Stage('save', ['python', '-c', {saves!r}], 0, [], []), Stage('next', ['false'], 0, [], [])]\n"
        f"cli.run(Section, lambda config: run_stages(stages, Path(r'{tmp_path}')), None, [])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, process_group=0, stderr=subprocess.PIPE, text=True
    )
    wait_for((tmp_path / "begun").exists, process)
    os.killpg(process.pid, number)  # as Ctrl-C in a terminal does
    assert process.communicate(timeout=HANG_SECONDS)[1] == "interrupted: saved\n"  # and no line of the pipeline
    assert process.returncode == 3 and (tmp_path / "saved").read_text() == "x"


def test_stopped_program_exits_with_3_also_when_run_by_dash_c(tmp_path):
    waits = f"import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep({HANG_SECONDS})"
    (tmp_path / "waits.py").write_text(
        "from triderm_dist import cli; from triderm_dist.settings import Section\n"
        f"cli.run(Section, lambda config: exec({waits!r}), None, [])"
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    command = [sys.executable, "-m", "waits"]  # python -c would set a different status
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 3 and done.stderr.startswith("interrupted: "), done


def test_stages_lock_their_folder(tmp_path):
    waits = f"import time; from pathlib import Path; Path(r'{tmp_path}/begun').touch(); time.sleep({HANG_SECONDS})"
    code = (
        "from pathlib import Path; from triderm_dist.stages import Stage, _digest, run_stages\n"
        f"run_stages([Stage('wait', ['python', '-c', {waits!r}], 0, [], [])], Path(r'{tmp_path}'))"
    )
    begun: list[bool] = []
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as first:
        try:
            wait_for((tmp_path / "begun").exists, first)
            with pytest.raises(Busy, match=f"another run is active in this folder.*PID {first.pid} on "):
                run_stages([], tmp_path, begin=lambda: begun.append(True))
        finally:
            first.kill()
    assert not begun
    wait_for(partial(is_free, tmp_path))
    run_stages([], tmp_path, begin=lambda: begun.append(True))
    assert begun


# --- stages of the pipeline ------------------------------------------------------------------------------------------


def pipeline_stages(folder: Path, *words: str) -> dict[str, Stage]:
    config = load(PipelineRun, None, [f"output={folder}/run", *words])
    return {each.name: each for each in stages(config, folder / "config.yaml")}


def packed(folder: Path, task: str = "milk10k") -> Path:
    """Write an index.json of a packed set that names its task only."""
    folder.mkdir(parents=True)
    (folder / "index.json").write_text(json.dumps({"task": load_task(task).to_mapping()}))
    return folder


def test_inputs_of_each_pipeline_stage(make_challenge, tmp_path):
    challenge, test = make_challenge(), packed(tmp_path / "test")
    plain = pipeline_stages(tmp_path, f"data.source={challenge.folder}")
    one_table = pipeline_stages(tmp_path, f"data.source={challenge.metadata_path}")
    read = [challenge.metadata_path, challenge.truth_path, challenge.photo(0).parents[1]]
    assert plain["pack"].inputs == one_table["pack"].inputs == read
    for key, changed in {
        "seed=1": {"crossval", "embed", "stack"},
        "token_seed=1": {"crossval", "embed"},
        "predict.batch=3": {"predict"},
    }.items():
        words = [f"data.source={challenge.folder}", f"data.test_shards={test}", "stack.extra=[embeddings]"]
        before, after = pipeline_stages(tmp_path, *words), pipeline_stages(tmp_path, *words, key)
        assert {name for name in before if before[name].settings != after[name].settings} == changed
    spread = pipeline_stages(
        tmp_path, f"data.source={challenge.folder}", "parallel_folds=true", "gpus=0.5", "retries=0"
    )
    words = {"parallel_folds=true", "gpus=0.5", "retries=0"}
    assert set(spread["crossval"].command) - set(plain["crossval"].command) == words
    assert spread["crossval"].settings == plain["crossval"].settings


def test_test_set_is_packed_with_the_salt_of_the_training_set(make_challenge, tmp_path):
    test = f"data.test={make_challenge('test').folder}"
    train = tmp_path / "run" / "shards" / "train"

    def groups_of(*words: str) -> tuple[list[str], ...]:
        found = pipeline_stages(tmp_path, test, *words)
        packs = [found[name].command for name in ("pack", "pack test") if name in found]
        return tuple([word for word in command if word.startswith(("salt=", "groups="))] for command in packs)

    source = f"data.source={make_challenge().folder}"
    assert groups_of(source) == ([], [f"salt={train}"])
    assert groups_of(source, "data.groups=plain") == (["groups=plain"], ["groups=plain"])
    shards = packed(tmp_path / "shards")
    assert groups_of(f"data.shards={shards}") == ([],)  # its salt is not at hand, if it has one
    shards.with_name("shards.groups.csv").touch()
    assert groups_of(f"data.shards={shards}") == ([f"salt={shards}"],)
    hashed, plain = (pipeline_stages(tmp_path, source, f"data.groups={kind}") for kind in ("hash", "plain"))
    assert {name for name in hashed if hashed[name].settings != plain[name].settings} == {"pack"}


def test_photos_may_be_deleted_once_they_are_packed(make_challenge, tmp_path):
    words = [f"data.source={make_challenge().folder}", f"data.test={make_challenge('test').folder}"]
    full = pipeline_stages(tmp_path, *words)
    for split in ("train", "test"):
        packed(tmp_path / "run" / "shards" / split)
    save(load(Experiment, None, [f"output={tmp_path}/run", *words]), tmp_path / "run" / "config.yaml")
    for name in ("challenge", "test"):
        shutil.rmtree(tmp_path / name)
    left = pipeline_stages(tmp_path, *words)
    assert set(full) - set(left) == {"pack", "pack test"}
    assert left["crossval"].settings == full["crossval"].settings
    with pytest.raises(DataError, match="no such folder"):  # not the folder that was packed
        pipeline_stages(tmp_path, f"data.source={tmp_path}/other")


def test_existing_test_shards_are_not_overwritten(make_challenge, tmp_path):
    words = [f"data.shards={packed(tmp_path / 'train')}", f"data.test={make_challenge().folder}"]
    assert "pack test" in pipeline_stages(tmp_path, *words)
    assert "pack test" not in pipeline_stages(tmp_path, *words, f"data.test_shards={packed(tmp_path / 'test')}")


def test_fused_features_are_predicted_before_stacking(tmp_path):
    words = [f"data.shards={packed(tmp_path / 'train')}", "stack.extra=[features]"]
    found = pipeline_stages(tmp_path, *words, f"data.test_shards={packed(tmp_path / 'test')}")
    assert list(found) == ["crossval", "predict folds", "stack", "predict", "report"]
    assert set(found["predict folds"].outputs) <= set(found["stack"].inputs)
    with pytest.raises(ConfigError, match=r"stack.extra: features .* test set; set data.test"):
        pipeline_stages(tmp_path, *words)


def test_both_folders_are_packed_for_one_task(tmp_path):
    train, test = (write(tmp_path / name, rows_of_photos()) for name in ("train", "test"))
    (train / "task.yaml").write_text(yaml.safe_dump(PER_PHOTO))
    (test / "task.yaml").write_text("of another study")
    found = pipeline_stages(tmp_path, f"data.source={train}", f"data.test={test}")
    for name, folder in (("pack", train), ("pack test", test)):
        assert f"task={train / 'task.yaml'}" in found[name].command
        assert found[name].settings["task"] == task_of().to_mapping()
        assert found[name].inputs == [folder / "table.csv", folder]
    assert [path.name for path in found["predict"].outputs] == ["probabilities.csv", "decisions.csv"]
    assert [path.name for path in found["stack"].outputs[1:]] == ["oof_probabilities.csv", "oof_decisions.csv"]
    one_key = replace(task_of(), title="Our clinic")
    (train / "task.yaml").write_text(yaml.safe_dump(one_key.to_mapping()))
    changed = pipeline_stages(tmp_path, f"data.source={train}", f"data.test={test}")
    assert {name for name in found if found[name].settings != changed[name].settings} == {"pack", "pack test"}
    (train / "task.yaml").unlink()
    with pytest.raises(DataError, match=r"no task.yaml .* triderm task init"):
        pipeline_stages(tmp_path, f"data.source={train}")


def test_stages_of_milk10k_name_no_task_in_their_settings(make_challenge, tmp_path):
    challenge = make_challenge()
    found = pipeline_stages(tmp_path, f"data.source={challenge.folder}", f"data.test={challenge.folder}")
    for name in ("pack", "pack test"):
        assert found[name].settings == {"short_side": 288, "missing_view": "refuse", "invalid": "refuse"}
    assert [path.name for path in found["predict"].outputs] == ["submission.csv"]


def test_packed_sets_of_different_tasks_are_refused(tmp_path):
    train, test = packed(tmp_path / "train", "derm7pt"), packed(tmp_path / "test", "ham10000")
    with pytest.raises(DataError, match=r"test: was packed for task 'ham10000', not for task 'derm7pt'; pack the test"):
        pipeline_stages(tmp_path, f"data.shards={train}", f"data.test_shards={test}")
    with pytest.raises(
        DataError, match=r"train: was packed for task 'derm7pt', not for task 'ham10000'; remove data.t"
    ):
        pipeline_stages(tmp_path, f"data.shards={train}", "data.task=ham10000")
    assert "pack" not in pipeline_stages(tmp_path, f"data.shards={train}", "data.task=derm7pt")
    with pytest.raises(ConfigError, match=r"none/index.json: No such file or directory; give a packed set"):
        pipeline_stages(tmp_path, f"data.shards={tmp_path / 'none'}")
