"""Finished folds, checkpoints and stages are reused if settings and data are equal, also those of earlier versions.

`run_754ad2d` has records that commit 754ad2d wrote in a run of 100 synthetic lesions.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.small_tasks import TASKS
from triderm_dist.commands.pipeline import PipelineRun, stages
from triderm_dist.config import (
    COSMETIC,
    EXECUTION,
    Experiment,
    load,
)
from triderm_dist.config.hashes import FIRST_KEYS
from triderm_dist.engine.crossval import run_folds
from triderm_dist.engine.fold import (
    check_run_task,
    is_fold_finished,
    result_hash,
    result_hashes,
    resume_hash,
    resume_hashes,
)
from triderm_dist.engine.token_extraction import augmented_versions
from triderm_dist.schema import ConfigError, DataError
from triderm_dist.tasks import milk10k_task

OLD_RUN = Path(__file__).parent / "run_754ad2d"
RECORDS = json.loads((OLD_RUN / "hashes.json").read_text())
INDEX = SimpleNamespace(fingerprint=RECORDS["fingerprint"])


@pytest.fixture
def old_run(tmp_path) -> Path:
    """Copy of the old run with all files that `is_fold_finished` reads."""
    shutil.copytree(OLD_RUN, tmp_path / "run")
    (tmp_path / "run" / "tri" / "fold-0" / "predictions.parquet").touch()
    return tmp_path / "run"


def settings(folder: Path, *words: str) -> Experiment:
    return load(Experiment, folder / "config.yaml", [f"output={folder}", *words])


def stage_hashes(*words: str) -> dict[str, str]:
    words = ("data.shards=train", "data.test_shards=test", *words)
    run = stages(load(PipelineRun, OLD_RUN / "config.yaml", words), Path("config.yaml"))
    return {
        stage.name: hashlib.sha256(
            json.dumps(stage.former_settings or stage.settings, sort_keys=True).encode()
        ).hexdigest()
        for stage in run
    }


def test_fold_finished_by_the_first_version_is_complete(old_run):
    assert is_fold_finished(settings(old_run), INDEX, "tri", 0)
    assert is_fold_finished(settings(old_run, "models.tri.train.log_every=7"), INDEX, "tri", 0)
    assert not is_fold_finished(settings(old_run, "models.tri.train.optim.lr=3e-3"), INDEX, "tri", 0)
    assert not is_fold_finished(settings(old_run, "token_seed=1"), INDEX, "tri", 0)
    assert not is_fold_finished(settings(old_run), SimpleNamespace(fingerprint="other data"), "tri", 0)


def test_run_with_folds_of_another_task_is_refused(old_run):
    index = SimpleNamespace(task=TASKS["photos only"], folder="SHARDS", fingerprint="other")
    message = f"{old_run}/tri/fold-0: trained for task 'milk10k', and SHARDS is packed for task 'small'; set another"
    with pytest.raises(DataError, match=re.escape(message)):
        run_folds(settings(old_run), index, ["frozen"], [1])  # also where this fold is not trained yet
    assert [path.name for path in (old_run / "tri").iterdir()] == ["fold-0"]
    check_run_task(settings(old_run), SimpleNamespace(task=milk10k_task()))


def test_obsolete_explain_setting_is_accepted_only_if_empty():
    assert "explain: []" in (OLD_RUN / "config.yaml").read_text()
    assert not hasattr(settings(OLD_RUN), "explain")
    with pytest.raises(ConfigError, match="unknown setting 'explain'"):
        settings(OLD_RUN, "explain=[IL_1]")


def test_checkpoint_of_the_first_version_is_resumed():
    words = [f"models.tri.train.{word}" for word in ("epochs=40", "micro_batch=8", "optim.lr=1e-4")]
    assert resume_hash(settings(OLD_RUN, *words), INDEX, "tri", 0) == RECORDS["checkpoint_with_40_epochs"]
    other = settings(OLD_RUN, *words, "models.tri.train.global_batch=32")
    assert resume_hash(other, INDEX, "tri", 0) != RECORDS["checkpoint_with_40_epochs"]


def test_stages_and_tokens_of_the_first_version_are_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text("{}")  # the first version wrote no task
    assert stage_hashes("ensemble.use=ensemble") == RECORDS["stages"]
    for words in ((), ("ensemble.use=ensemble", "stack.max_depth=3")):  # the default decides anew what predicts
        changed = stage_hashes(*words)
        assert {name for name in changed if changed[name] != RECORDS["stages"][name]} == {"stack"}
    augment = settings(OLD_RUN).models["frozen"].train.augment
    assert augmented_versions(augment, 0) == RECORDS["augmented_versions"]
    for change in ({"rotation": 1.0}, {"extra": {"random_erasing": {"share": 0.1}}}):
        assert augmented_versions(augment.model_copy(update=change), 0) != RECORDS["augmented_versions"]
    assert augmented_versions(augment.model_copy(update={"clinical_dropout": 0.9}), 0) == RECORDS["augmented_versions"]


@pytest.mark.parametrize("word", ["token_seed=0", "models.tri.train.validate_every=5"])
def test_setting_without_effect_keeps_finished_folds(old_run, word):
    """`token_seed` equal to `seed`, and how often a training is validated whose last weights are kept."""
    plain, given = settings(old_run), settings(old_run, word)
    for hashes in (result_hashes, resume_hashes):
        assert hashes(plain, INDEX, "tri", 0) == hashes(given, INDEX, "tri", 0)[:1]
    assert is_fold_finished(given, INDEX, "tri", 0)
    assert not is_fold_finished(settings(old_run, word, "seed=1"), INDEX, "tri", 0)
    by_score = settings(old_run, "models.tri.train.select=best", "models.tri.train.validate_every=5")
    assert result_hashes(by_score, INDEX, "tri", 0) != result_hashes(plain, INDEX, "tri", 0)
    now, earlier = result_hashes(given, INDEX, "tri", 0)
    assert (now, earlier) == (result_hash(plain, INDEX, "tri", 0), result_hash(given, INDEX, "tri", 0))
    file = old_run / "tri" / "fold-0" / "fold.json"
    file.write_text(file.read_text().replace(now, earlier))  # earlier versions included the setting
    assert is_fold_finished(given, INDEX, "tri", 0)


def first_formula(experiment: Experiment, name: str, fold: int, exclude: tuple[str, ...] = ()) -> str:
    """Return the hash of commit 754ad2d, over the settings that it had."""

    def known(tree: dict, path: str) -> dict:
        return {
            key: value if f"{path}.{key}" in FIRST_KEYS else known(value, f"{path}.{key}")
            for key, value in tree.items()
            if any(f"{first}.".startswith(f"{path}.{key}.") for first in FIRST_KEYS)
        }

    model = known(experiment.models[name].model_dump(mode="json"), "models.NAME")
    for key in (*COSMETIC, *exclude):
        model["train"].pop(key, None)
    content = [model, experiment.seed, experiment.data.folds, experiment.data.fold_seed, fold, INDEX.fingerprint]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("words", [[], ["seed=4"], ["models.tri.width=64"], ["models.frozen.train.select=best"]])
@pytest.mark.parametrize("name", ["tri", "frozen"])
def test_hashes_equal_those_of_the_first_version(words, name):
    experiment = settings(OLD_RUN, *words)
    assert result_hash(experiment, INDEX, name, 1) == first_formula(experiment, name, 1)
    assert result_hash(experiment, INDEX, name, 1, exclude=EXECUTION) == first_formula(experiment, name, 1, EXECUTION)
