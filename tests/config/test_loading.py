"""Settings read from files, from the folder of a run, and with plugins."""

import re
import sys

import pytest

from triderm_dist.config import Experiment, as_yaml, load, save
from triderm_dist.schema import ConfigError


def test_missing_config_file_gives_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load(Experiment, tmp_path / "none.yaml")


def test_overrides_take_precedence_and_train_is_shared(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("train: {epochs: 7, optim: {lr: 1e-3}}\nmodels: {a: {}, b: {train: {epochs: 9}}}\n")
    config = load(Experiment, file, ["train.optim.lr=2e-3"])
    assert (config.models["a"].train.epochs, config.models["b"].train.epochs) == (7, 9)
    assert config.models["b"].train.optim.lr == 0.002


def test_settings_override_those_of_the_base_file(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 3\ntrain: {epochs: 7, micro_batch: 8}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\ntrain: {epochs: 9}\n")
    config = load(Experiment, tmp_path / "b.yaml")
    assert (config.seed, config.train.epochs, config.train.micro_batch) == (3, 9, 8)


@pytest.mark.parametrize("base", ["a.yaml", "b.yaml"])
def test_cycle_of_base_files_is_refused(tmp_path, base):
    (tmp_path / "a.yaml").write_text(f"base: {base}\n")
    (tmp_path / "b.yaml").write_text("base: ./a.yaml\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: `base` forms a cycle \(a\.yaml -> .*a\.yaml\)"):
        load(Experiment, tmp_path / "a.yaml")


def test_base_may_be_a_shipped_experiment(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: rtx4090\nseed: 3\n")
    config = load(Experiment, tmp_path / "mine.yaml")
    assert (config.seed, config.train.micro_batch) == (3, load(Experiment, "rtx4090").train.micro_batch)


def test_stale_output_of_a_former_version_means_the_folder_of_the_file(tmp_path):
    text = as_yaml(load(Experiment, None, ["output=runs/x", "data.source=runs/x/data", "data.test=runs/xy"]))
    for file in ("trimodal/fold-0/config.yaml", "config.yaml"):
        path = tmp_path / "moved" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        config = load(Experiment, path)
        expected = (str(tmp_path / "moved"), f"{tmp_path}/moved/data", "runs/xy")
        assert (config.output, config.data.source, config.data.test) == expected
    assert load(Experiment, None, [f"run={tmp_path}/moved"]).output == str(tmp_path / "moved")
    other = tmp_path / "mine" / "config.yaml"  # a copy outside any run is an experiment like any other
    other.parent.mkdir()
    other.write_text(text)
    assert load(Experiment, other).output == "runs/x"


def test_saved_settings_start_another_run(saved_run):
    config = load(Experiment, "runs/one/config.yaml", ["output=runs/two"])
    assert (config.output, config.data.source) == ("runs/two", "runs/one/data/train")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=none"], "run: none: no such folder"),
        (["run=runs"], "run: runs: holds no config.yaml; name a folder that a run wrote"),
        (["run=runs/one/trimodal/fold-0"], "is the folder of a fold; name the run, runs/one"),
        (
            ["run=runs/one", "output=runs/two"],
            "start another run with the same settings: --config runs/one/config.yaml",
        ),
    ],
)
def test_run_that_cannot_be_worked_on_gives_one_line(saved_run, words, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        load(Experiment, None, words)
    assert "\n" not in str(raised.value)


def test_fold_trained_by_itself_is_named_where_the_run_has_no_settings(saved_run):
    (saved_run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"--config runs/one/trimodal/fold-0/config\.yaml"):
        load(Experiment, None, ["run=runs/one"])


def test_saved_settings_that_are_cut_off_are_refused(saved_run):
    file = saved_run / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    for kept in range(len(lines)):  # most of these are valid YAML
        file.write_text("".join(lines[:kept]))
        with pytest.raises(ConfigError, match=r"config\.yaml: its settings are cut off; restore it from a copy"):
            load(Experiment, None, [f"run={saved_run}"])


def test_run_and_config_exclude_each_other(saved_run):
    with pytest.raises(ConfigError, match="run: takes the settings of that run; remove --config"):
        load(Experiment, "milk10k", ["run=runs/one"])


def test_fold_of_a_further_seed_belongs_to_its_run(tmp_path):
    """Its settings name the model whose seed it is."""
    run = tmp_path / "run"
    experiment = load(Experiment, None, ["models={a: {seeds: 2}}", f"output={run}"])
    for folder in (run, experiment.fold_folder("a-s1", 0)):
        folder.mkdir(parents=True)
        save(experiment, folder / "config.yaml")
    moved = run.rename(tmp_path / "moved")
    assert load(Experiment, moved / "a-s1" / "fold-0" / "config.yaml").folder == moved


def test_plugins_are_imported_before_settings_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_table.py").write_text("import sys\nsys.loaded_plugins.append(__file__)\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "my_table.py").write_text("import sys\nsys.loaded_plugins.append('other')\n")
    monkeypatch.setattr(sys, "loaded_plugins", loaded := [], raising=False)
    config = load(Experiment, None, ["plugins=[my_table.py]"])
    assert config.plugins == (str(tmp_path / "my_table.py"),)
    load(Experiment, None, ["plugins=[my_table.py, other/my_table.py]"])
    assert loaded == [str(tmp_path / "my_table.py"), "other"]


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "FileNotFoundError"), ("1 / 0", "broken.py, line 1: ZeroDivisionError: division by zero")],
)
def test_failing_plugin_import_gives_one_line(text, message, tmp_path):
    if text:
        (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load(Experiment, None, [f"plugins=[{tmp_path}/broken.py]"])
    assert "\n" not in str(raised.value) and not any("plugin_broken" in name for name in sys.modules)


@pytest.mark.parametrize("words", [["run=~no-such-user/x"], ["plugins=~no-such-user/x.py"]])
def test_folder_of_an_unknown_user_is_refused(words):
    with pytest.raises(ConfigError, match=r"(?i)~no-such-user/x.*no such f"):
        load(Experiment, None, words)


def test_file_of_an_unknown_user_is_refused(tmp_path):
    (tmp_path / "own.yaml").write_text("base: ~no-such-user/x.yaml\n")
    for file in ("~no-such-user/x.yaml", tmp_path / "own.yaml"):
        with pytest.raises(ConfigError, match=r"~no-such-user/x\.yaml: no such file"):
            load(Experiment, file)


def test_plugin_that_is_a_program_does_not_end_this_one(tmp_path):
    (tmp_path / "program.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ConfigError, match=r"program\.py, line 2: SystemExit: 0"):
        load(Experiment, None, [f"plugins={tmp_path}/program.py"])
