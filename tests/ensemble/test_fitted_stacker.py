"""Properties of every kind of stacker: registry, files, absent diagnoses and wide columns."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from tests.ensemble.conftest import training_rows
from triderm_dist.config import StackConfig
from triderm_dist.ensemble.fitted_stacker import (
    STACKERS,
    FittedStacker,
    Reduction,
    fit_stacker,
    ignored_settings,
    stacker_kind,
)
from triderm_dist.ensemble.stack_inputs import base_columns
from triderm_dist.ensemble.stacker import Stacker, TrainingRows
from triderm_dist.predictions import OofTable
from triderm_dist.schema import DIAGNOSES, ConfigError, DataError
from triderm_dist.settings import Section
from triderm_dist.tasks import milk10k_task

QUICK = StackConfig(max_rounds=2, learning_rate=0.4, device="cpu")


class PriorSettings(Section):
    power: float = 1.0


class PriorStacker(Stacker):
    """Predicts the frequency of each diagnosis and ignores the columns."""

    title: ClassVar[str] = "prior"
    suffix: ClassVar[str] = ".prior"
    Settings: ClassVar[type[Section]] = PriorSettings

    def __init__(self, prior):
        self.prior = prior

    @classmethod
    def fit(cls, rows, settings, *, seed, cores=1, fold_stackers=()):
        assert rows.columns().shape == (len(rows), len(rows.names)) and rows.wide == 0
        return cls(np.bincount(rows.labels, minlength=len(rows.diagnoses)) ** settings.power)

    def predict(self, columns):
        return np.tile(self.prior, (len(columns), 1))

    def save(self, path):
        path.write_text("prior")
        return {"prior": self.prior.tolist()}

    @classmethod
    def load(cls, path, description):
        path.read_text()
        return cls(np.array(description["prior"]))


@pytest.fixture
def prior(monkeypatch) -> StackConfig:
    monkeypatch.setitem(STACKERS, "prior", PriorStacker)
    return StackConfig(kind="prior", settings={"power": 0.5})


def test_registered_stacker_is_fitted_saved_and_loaded(table: OofTable, tmp_path: Path, prior: StackConfig) -> None:
    fit_stacker(training_rows(table), QUICK).save(tmp_path / "stack.json", milk10k_task())
    stacker = fit_stacker(training_rows(table), prior)
    stacker.save(tmp_path / "stack.json", milk10k_task())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "stack.json",
        "stack.prior",
    ]  # the former stack.ubj is removed
    loaded = FittedStacker.load(tmp_path / "stack.json")
    root = np.sqrt(np.bincount(table.labels))
    np.testing.assert_allclose(loaded.predict(base_columns(table)), np.tile(root / root.sum(), (len(table), 1)))
    assert loaded.kind == "prior" and loaded.model.summary() == "prior"


def test_stacker_without_its_plugin_or_file_is_refused(table: OofTable, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(DataError, match=r"stack\.json: no such file; run triderm stack first"):
        FittedStacker.load(tmp_path / "stack.json")
    monkeypatch.setitem(STACKERS, "prior", PriorStacker)
    fit_stacker(training_rows(table), StackConfig(kind="prior")).save(tmp_path / "stack.json", milk10k_task())
    (tmp_path / "stack.prior").unlink()
    with pytest.raises(DataError, match=r"stack\.prior: no such file"):
        FittedStacker.load(tmp_path / "stack.json")
    monkeypatch.delitem(STACKERS, "prior")
    with pytest.raises(DataError, match=r"stack\.json: 'prior' is not a stacker; known: xgboost; .*plugins"):
        FittedStacker.load(tmp_path / "stack.json")


def test_runs_from_before_stack_kinds_are_read(table: OofTable, tmp_path: Path) -> None:
    stacker = fit_stacker(training_rows(table), QUICK)
    stacker.save(tmp_path / "stack.json", milk10k_task())
    description = json.loads((tmp_path / "stack.json").read_text())
    del description["kind"], description["checksum"], description["model_sha256"]
    (tmp_path / "stack.json").write_text(json.dumps(description))
    assert FittedStacker.load(tmp_path / "stack.json") == stacker


def test_unknown_kinds_and_settings_are_refused(prior: StackConfig) -> None:
    assert stacker_kind(prior) == (PriorStacker, PriorSettings(power=0.5))
    for change, message in (
        ({"kind": "x"}, r"stack\.kind: 'x' is not a stacker; known: prior, xgboost \(plugins may add others\)"),
        ({"settings": {"powr": 1}}, r"stack\.settings: unknown setting 'powr'; did you mean 'power'"),
        ({"kind": "xgboost"}, r"stack\.settings: xgboost has no settings there; write stack.max_depth=3"),
    ):
        with pytest.raises(ConfigError, match=message):
            stacker_kind(prior.model_copy(update=change))


def test_entries_that_are_no_stacker_are_refused(monkeypatch) -> None:
    for entry, message in (
        (dict, r"stack\.kind: 'other' of STACKERS is no subclass of Stacker"),
        (type("Other", (Stacker,), {}), r"stack\.kind: 'other' of STACKERS has no method fit"),
        (type("Other", (PriorStacker,), {"packages": "sklearn"}), r"packages of 'other' is a text; write \('skl"),
        (type("Other", (PriorStacker,), {"suffix": ".json"}), r"'other' has the suffix \.json, which is in use"),
    ):
        monkeypatch.setitem(STACKERS, "other", entry)
        with pytest.raises(ConfigError, match=message):
            stacker_kind(StackConfig(kind="other"))


@pytest.mark.parametrize(
    ("predict", "message"),
    [
        (lambda table: table[:, 0], r"the stacker other predicted shape \(\d+,\), not \(\d+, 11\)"),
        (
            lambda table: table * np.nan,
            "the stacker other predicted probabilities that are negative, not finite, or all",
        ),
        (lambda table: table * 0, "the stacker other predicted probabilities that are negative, not finite, or all 0"),
        (lambda table: table - 1e9, "the stacker other predicted probabilities that are negative, not finite, or all"),
    ],
)
def test_predictions_that_are_no_probabilities_are_refused(table: OofTable, monkeypatch, predict, message) -> None:
    methods = {"predict": lambda self, columns: predict(PriorStacker.predict(self, columns))}
    monkeypatch.setitem(STACKERS, "other", type("Other", (PriorStacker,), methods))
    rows = training_rows(table)
    with pytest.raises(DataError, match=message):
        fit_stacker(rows, StackConfig(kind="other")).predict(rows.columns())


def test_settings_without_effect_are_noted(prior: StackConfig) -> None:
    changed = {"max_depth": 5, "components": 3}
    assert ignored_settings(prior.model_copy(update=changed)) == ["stack.max_depth has no effect with stack.kind=prior"]
    assert ignored_settings(StackConfig(max_depth=5)) == ignored_settings(StackConfig(enabled=False)) == []
    assert ignored_settings(StackConfig(enabled=False, **changed)) == [
        "stack.max_depth has no effect with stack.enabled=false",
        "stack.components has no effect with stack.enabled=false",
    ]


@pytest.mark.parametrize("kind", ["xgboost", "prior"])
def test_absent_diagnoses_have_no_probability(table: OofTable, monkeypatch, kind: str) -> None:
    monkeypatch.setitem(STACKERS, "prior", PriorStacker)
    config = QUICK.model_copy(update={"kind": kind})
    stacker = fit_stacker(training_rows(table, np.where(np.isin(table.labels, [2, 6]), -1, table.labels)), config)
    assert stacker.absent == ("BEN_OTH", "MAL_OTH")
    probabilities = stacker.predict(base_columns(table))
    assert (probabilities[:, [2, 6]] == 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    with pytest.raises(DataError, match="two diagnoses"):
        fit_stacker(training_rows(table, np.where(table.labels == 1, 1, -1)), config)


def test_more_rows_than_a_fit_takes_are_sampled(table: OofTable, monkeypatch) -> None:
    class Recorder(PriorStacker):
        @classmethod
        def fit(cls, rows, settings, *, seed, cores=1, fold_stackers=()):
            seen.append(rows)
            return super().fit(rows, settings, seed=seed)

    seen: list[TrainingRows] = []
    monkeypatch.setitem(STACKERS, "recorder", Recorder)
    few = training_rows(table)
    fit_stacker(few, StackConfig(kind="recorder"))
    labels = np.random.default_rng(0).choice(11, 5000, p=np.arange(1, 12) ** 3 / 4356)
    places = np.arange(5000) % len(table)
    many = training_rows(table, labels, source=few.source[places], indices=np.arange(5000), groups=table.groups[places])
    fit_stacker(many, StackConfig(kind="recorder", max_rows=1000), seed=3)
    fit_stacker(many, StackConfig(kind="recorder", max_rows=1000), seed=3)
    fit_stacker(many, StackConfig(kind="recorder", max_rows=None))
    whole, sample, again, unlimited = seen
    assert whole.weights is None and len(whole) == len(table)
    assert unlimited.weights is None and len(unlimited) == 5000
    counts, kept = (np.bincount(each.labels, minlength=11) for each in (many, sample))
    assert 1000 <= len(sample) <= 1011 and (kept >= np.minimum(counts, 20)).all()
    rare = kept == counts  # all lesions of the rarest; of the others by the square root of their number
    np.testing.assert_allclose(kept[~rare] / np.sqrt(counts[~rare]), (kept / np.sqrt(counts))[10], rtol=0.05)
    assert 0 < rare.sum() < 11
    np.testing.assert_allclose(np.bincount(sample.labels, sample.weights, 11), counts)
    np.testing.assert_array_equal(sample.columns(), again.columns())
    held = sample.labels == 10
    np.testing.assert_array_equal(sample.take(held).weights, sample.weights[held])


def test_wrong_number_of_columns_is_refused(table: OofTable) -> None:
    stacker = fit_stacker(training_rows(table), QUICK)
    assert stacker.diagnoses == DIAGNOSES
    with pytest.raises(DataError, match=rf"fitted on {stacker.width} columns, got 3"):
        stacker.predict(np.zeros((2, 3), np.float32))


def test_wide_columns_are_reduced_by_training_rows_only(table: OofTable, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    block = 3 * np.eye(40)[:11][table.labels] + generator.normal(size=(len(table), 40))
    columns = np.concatenate([base_columns(table), block.astype(np.float32)], axis=1)
    train = table.folds != 0
    config = QUICK.model_copy(update={"components": 12, "max_rounds": 5})

    def fit(source: np.ndarray) -> FittedStacker:
        return fit_stacker(training_rows(table, source=source, extra="tower", wide=40).take(train), config)

    stacker = fit(columns)
    assert len(stacker.feature_names) == columns.shape[1] - 40 + 12 and stacker.feature_names[-1] == "tower/11"
    changed = columns.copy()
    changed[~train, -40:] = 99.0
    assert fit(changed).model == stacker.model
    Reduction.fit(columns, 40, 12, 2**53)  # the largest seed
    stacker.save(tmp_path / "stack.json", milk10k_task())
    loaded = FittedStacker.load(tmp_path / "stack.json")
    np.testing.assert_array_equal(loaded.predict(columns), stacker.predict(columns))
    fit_stacker(training_rows(table), QUICK).save(tmp_path / "stack.json", milk10k_task())
    assert not (tmp_path / "stack.safetensors").exists()


def test_stacker_whose_fit_returns_nothing_is_refused(table: OofTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        STACKERS, "nothing", type("Nothing", (PriorStacker,), {"fit": classmethod(lambda *a, **k: None)})
    )
    with pytest.raises(ConfigError, match="fit of 'nothing' returned NoneType, not a Nothing"):
        fit_stacker(training_rows(table), StackConfig(kind="nothing"))


def test_load_of_a_stacker_that_returns_nothing_is_refused(
    table: OofTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type("Nothing", (PriorStacker,), {"load": classmethod(lambda cls, path, description: None)})
    monkeypatch.setitem(STACKERS, "nothing", kind)
    fit_stacker(training_rows(table), StackConfig(kind="nothing")).save(tmp_path / "stack.json", milk10k_task())
    with pytest.raises(ConfigError, match="load of 'nothing' returned a NoneType, not the stacker"):
        FittedStacker.load(tmp_path / "stack.json")


def test_save_of_a_stacker_that_returns_no_mapping_is_refused(
    table: OofTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type("Silent", (PriorStacker,), {"save": lambda self, path: None})
    monkeypatch.setitem(STACKERS, "silent", kind)
    stacker = fit_stacker(training_rows(table), StackConfig(kind="silent"))
    with pytest.raises(ConfigError, match="save of 'silent' returned a NoneType, not a mapping"):
        stacker.save(tmp_path / "stack.json", milk10k_task())
