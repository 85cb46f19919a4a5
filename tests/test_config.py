"""Settings: strict, helpful, and the same after writing and reading."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import Field

from tests.processes import ROOT
from triderm_dist.config import RESERVED_MODELS, Experiment, RunReader, as_yaml, build, has_effect, load, load_run, save
from triderm_dist.ensemble.run_files import RESERVED
from triderm_dist.schema import ConfigError
from triderm_dist.settings import describe

EXPERIMENTS = ROOT / "launch" / "experiments"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"unknown setting 'train.epoch'; did you mean 'train.epochs'\?"),
        ("models.a.widht=3", r"unknown setting 'models.a.widht'; did you mean 'models.NAME.width'\?"),
        ("epoch=3", r"unknown setting 'epoch'; did you mean 'train.epochs'\?"),
        ("lr=1e-3", r"unknown setting 'lr'; did you mean 'train.optim.lr'\?"),
        ("xyzzy=3", "unknown setting 'xyzzy'; --help-all lists them"),
        ("train.epochs=many", "train.epochs: input should be a valid integer"),
        ("models.a.width=30", "width 30 is not a multiple of heads 8"),
        ("models.a.train.loss.alpha=0.3", "alpha works with head=sigmoid only"),
        ("models.a.mlp_ratio=1e-9", "mlp_ratio 1e-09 of width 768 leaves no hidden unit"),
        ("models.a.width=9000000000000000000", "models.a.width: input should be less than or equal to 1048576"),
        ("models.a.tower.image_size=1000000000", "image_size: input should be less than or equal to 16384"),
        ("train.global_batch=1000000000000", "train.global_batch: input should be less than or equal to 1048576"),
        ("predict.batch=1000000000000", "predict.batch: input should be less than or equal to 1048576"),
        ("rank_timeout=1e30", "rank_timeout: input should be less than or equal to 1000000000"),
        ("epochs", "'epochs' is not a setting; write key.subkey=value"),
        ("train.optim.lr=[1", "train.optim.lr: '\\[1': not readable as YAML"),
    ],
)
def test_invalid_settings_give_one_line(override, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(Experiment, None, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", "..", ".a", "a/b", "a\\b", "../a", "a b", "-a", "=a", "+a", "@a", "a,b", "a:b"),
        *("a\n", "a\x00", "a\u202eb", "x" * 65, "stack", "Mean", "fitted", "chosen", "ensemble"),
        *("shards", "tokens", "towers", "refit", "fold-0"),
    ],
)
def test_model_whose_name_cannot_be_a_folder_or_is_taken_is_refused(name):
    with pytest.raises(ConfigError, match=r"models: .*(can't be named|holds U\+)") as error:
        build(Experiment, {"models": {name: {}}})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a", "CNN-2", "v1.5", "großes_netz", "1", "a+b", "x" * 64])
def test_other_names_of_models_are_allowed(name):
    assert list(build(Experiment, {"models": {name: {}}}).models) == [name]


def test_models_that_differ_in_case_only_are_refused():
    with pytest.raises(ConfigError, match="models: the models 'cnn' and 'CNN' differ in case only"):
        build(Experiment, {"models": {"cnn": {}, "CNN": {}}})


def test_names_of_ensemble_members_are_reserved():
    assert set(RESERVED) <= RESERVED_MODELS


def test_missing_config_file_gives_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load(Experiment, tmp_path / "none.yaml")


def test_overrides_take_precedence_and_train_is_shared(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("train: {epochs: 7, optim: {lr: 1e-3}}\nmodels: {a: {}, b: {train: {epochs: 9}}}\n")
    config = load(Experiment, file, ["train.optim.lr=2e-3"])
    assert (config.models["a"].train.epochs, config.models["b"].train.epochs) == (7, 9)
    assert config.models["b"].train.optim.lr == 0.002


def test_default_model_trains_with_the_shared_settings():
    assert load(Experiment, None, ["train.epochs=7"]).models["trimodal"].train.epochs == 7


def test_saved_settings_round_trip_and_can_be_overridden(tmp_path):
    config = load(Experiment, None, ["models.a.train.epochs=3", "models.b.width=64", "train.optim.lr=1e-3"])
    save(config, tmp_path / "config.yaml")
    assert load(Experiment, tmp_path / "config.yaml") == config
    changed = load(Experiment, tmp_path / "config.yaml", ["train.epochs=5"])
    assert (changed.models["a"].train.epochs, changed.models["b"].train.epochs) == (3, 5)


# --- run=FOLDER and saved settings ------------------------------------------------------------------------------------


@pytest.fixture
def saved_run(tmp_path, monkeypatch) -> Path:
    """A run of relative paths, in and outside its folder, saved from the working directory."""
    monkeypatch.chdir(tmp_path)
    words = ["output=runs/one", "data.source=runs/one/data/train", "data.test=test", "data.shards=s3://bucket/train"]
    config = load(Experiment, None, [*words, "data.task=derm7pt", "tokens=runs/one/cache", "seed=3"])
    save(config, Path("runs/one/config.yaml"))
    save(config, Path("runs/one/trimodal/fold-0/config.yaml"))
    return tmp_path / "runs" / "one"


def paths_of(config: Experiment) -> dict[str, str | None]:
    data = {key: getattr(config.data, key) for key in ("source", "test", "shards", "task", "test_truth")}
    return {"output": config.output, "tokens": config.tokens, **data}


def test_run_means_its_folder_from_any_working_directory(saved_run, tmp_path, monkeypatch):
    outside = {"test": f"{tmp_path}/test", "shards": "s3://bucket/train", "task": "derm7pt", "test_truth": None}
    relative = {"output": "runs/one", "source": "runs/one/data/train", "tokens": "runs/one/cache"}
    for config in (
        load(Experiment, None, ["run=runs/one"]),
        load(Experiment, None, ["run=runs/one/"]),
        load_run(Experiment, "runs/one"),
        load(Experiment, "runs/one/config.yaml"),
        load(Experiment, "runs/one/trimodal/fold-0/config.yaml"),
    ):
        assert paths_of(config) == outside | relative and config.seed == 3
    moved = saved_run.rename(tmp_path / "two")
    monkeypatch.chdir("/")
    for file in (moved / "config.yaml", moved / "trimodal" / "fold-0" / "config.yaml"):
        expected = {"output": str(moved), "source": f"{moved}/data/train", "tokens": f"{moved}/cache"}
        assert paths_of(load(Experiment, file)) == outside | expected
    assert load(Experiment, None, [f"run={moved}", "seed=4"]).seed == 4
    monkeypatch.chdir(moved)
    assert paths_of(load(Experiment, "config.yaml"))["source"] == "data/train"


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


def test_plugin_in_the_run_moves_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "my_plugin.py").write_text("LOADED = 1\n")
    save(load(Experiment, None, ["output=one", "plugins=[one/my_plugin.py, json]"]), Path("one/config.yaml"))
    (tmp_path / "one").rename(tmp_path / "two")
    assert load(Experiment, None, ["run=two"]).plugins == (f"{tmp_path}/two/my_plugin.py", "json")
    assert sys.modules.pop("triderm_plugin_my_plugin").LOADED == 1


def test_run_and_config_exclude_each_other(saved_run):
    with pytest.raises(ConfigError, match="run: takes the settings of that run; remove --config"):
        load(Experiment, "milk10k", ["run=runs/one"])


def test_reader_of_a_run_writes_where_output_says(saved_run):
    config = load(RunReader, None, ["run=runs/one", "output=elsewhere"])
    assert (config.folder, config.results, config.experiment.output) == (
        Path("runs/one"),
        Path("elsewhere"),
        "runs/one",
    )
    assert load_run(RunReader, "runs/one").results == Path("runs/one")
    assert load(RunReader, "runs/one/config.yaml").folder == Path("runs/one")


def test_every_setting_has_a_description():
    rows = list(describe(Experiment))
    assert len(rows) > 80
    assert all(text for *_, text in rows)
    assert "models.NAME.train.optim.layer_decay" in {key for key, *_ in rows}


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda file: file.stem)
def test_experiment_files_are_valid(file):
    config = load(Experiment, file)
    for model in config.models.values():
        assert model.train.global_batch % model.train.micro_batch == 0


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


def test_home_is_expanded_in_paths():
    config = load(Experiment, None, ["output=~/run", "data.remote.cache=~/cache", "data.shards=s3://bucket/~x"])
    assert (config.output, config.data.remote.cache) == (
        str(Path("~/run").expanduser()),
        str(Path("~/cache").expanduser()),
    )
    assert config.data.shards == "s3://bucket/~x"


def test_every_path_setting_has_the_path_type():
    """Without the path type `~` would not be expanded; settings described as folder or URL must have it."""
    rows = {key: type_name for key, type_name, _, text in describe(Experiment) if re.search(r"\b(folder|URL)\b", text)}
    assert {key for key, type_name in rows.items() if "path" not in type_name} <= {
        "data.invalid",
        "data.verify",
        "data.missing_view",
        "data.remote.cache_gb",
        "data.remote.allow_commands",
    }


def test_settings_that_affect_a_program():
    class Program(Experiment):
        uses = ("output", "data.shards", "train")
        own: int = Field(1, description="own")

    affecting = ["own", "output", "data", "data.shards", "train", "train.optim.lr"]
    others = ["seed", "data.source", "models.a.width", "stack"]
    assert [key for key in affecting + others if has_effect(Program, key)] == affecting


def test_plugins_are_imported_before_settings_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_table.py").write_text("LOADED = []\nLOADED.append(1)\n")
    config = load(Experiment, None, ["plugins=[my_table.py]"])
    assert config.plugins == (str(tmp_path / "my_table.py"),)
    load(Experiment, None, ["plugins=[my_table.py]"])
    assert sys.modules.pop("triderm_plugin_my_table").LOADED == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "FileNotFoundError"), ("1 / 0", "broken.py: ZeroDivisionError: division by zero")],
)
def test_failing_plugin_import_gives_one_line(text, message, tmp_path):
    if text:
        (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load(Experiment, None, [f"plugins=[{tmp_path}/broken.py]"])
    assert "\n" not in str(raised.value) and "triderm_plugin_broken" not in sys.modules


def test_seeds_are_models_that_follow_theirs(tmp_path):
    words = ["models={a: {width: 64, seeds: 3, train: {epochs: 9}}, b: {}}", "train.epochs=7", f"output={tmp_path}"]
    experiment = load(Experiment, None, [*words, "seed=5"])
    assert list(experiment.models) == ["a", "a-s1", "a-s2", "b"]
    assert [experiment.seed_of(name) for name in experiment.models] == [5, 6, 7, 5]
    assert [each.train.epochs for each in experiment.models.values()] == [9, 9, 9, 7]
    # Dumped and saved settings follow a change of the model, and of the number of its seeds.
    dumped = experiment.model_dump(mode="json")
    assert build(Experiment, dumped) == experiment
    save(experiment, tmp_path / "config.yaml")
    for again in (dumped, yaml.safe_load((tmp_path / "config.yaml").read_text().replace("${config_dir}", "x"))):
        again["models"]["a"] |= {"width": 32, "seeds": 2}
        changed = build(Experiment, again)
        assert [(name, each.width) for name, each in changed.models.items()] == [("a", 32), ("a-s1", 32), ("b", 768)]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("{a: {seeds: 2}, a-s1: {}}", r"'a-s1' is a model, and the name of a further seed of 'a'; rename one"),
        ("{a: {seeds: 0}}", r"a\.seeds: write 1 or more"),
        ("{a: {}, b-s1: {seeds: 0}}", r"b-s1\.seeds: write 1 or more"),
        ("{a: {seeds: -1}}", "greater than or equal to 0"),
    ],
)
def test_seeds_without_a_model_of_their_own_are_refused(models, message):
    with pytest.raises(ConfigError, match=message):
        load(Experiment, None, [f"models={models}"])


def test_fold_of_a_further_seed_belongs_to_its_run(tmp_path):
    """Its settings name the model whose seed it is."""
    run = tmp_path / "run"
    experiment = load(Experiment, None, ["models={a: {seeds: 2}}", f"output={run}"])
    for folder in (run, experiment.fold_folder("a-s1", 0)):
        folder.mkdir(parents=True)
        save(experiment, folder / "config.yaml")
    moved = run.rename(tmp_path / "moved")
    assert load(Experiment, moved / "a-s1" / "fold-0" / "config.yaml").folder == moved
