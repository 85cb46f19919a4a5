"""Search for settings: a space, trials that train as `launch.train` does, and what came out of them.

    OUTPUT/search/search.yaml, space.yaml   what is searched, as it was started
    OUTPUT/search/trial-001/                a run of its own: trial.json and MODEL/fold-K; trial 1 has the experiment's
                                            own settings, the baseline
    OUTPUT/search/trials.csv                one row a trial
    OUTPUT/search/ray/                      Ray Tune's state, from which a killed search goes on
    OUTPUT/best.yaml                        the experiment with the best settings

Ray decides what runs where and when it stops; all that is told about a trial is in its folder.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import random
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field, model_validator

from triderm_dist.cli import Interrupted
from triderm_dist.config import Experiment, ModelConfig, Section, build, load, merge, nest, save
from triderm_dist.files import whole, write_json
from triderm_dist.schema import ConfigError, DataError, InputError

if TYPE_CHECKING:
    from triderm_dist.data.shards import ShardIndex
    from triderm_dist.metrics import Interval

BASELINE = 1
"""The number of the trial with the experiment's own settings."""
REDUCTION = 3
"""ASHA lets one trial in so many pass each of its rungs."""
State = Literal["running", "complete", "stopped", "failed"]


class SearchConfig(Section):
    space: str = Field("tune/spaces/losses.yaml", description="YAML file of the settings to vary and their ranges")
    trials: int = Field(12, ge=1, description="trials in all; the first has the experiment's own settings")
    model: str | None = Field(None, description="the model of `models` whose settings vary; null takes the first")
    folds: tuple[int, ...] = Field(
        (0,), min_length=1, description="folds that a trial trains; the aim is the mean of their macro F1 (argmax)"
    )
    searcher: Literal["tpe", "random"] = Field(
        "tpe", description="Optuna's tree-structured Parzen estimator, or random"
    )
    scheduler: Literal["asha", "none"] = Field(
        "asha", description="asha stops the trials that lag behind at an equal epoch"
    )
    grace_epochs: int = Field(1, ge=1, description="epochs before asha may stop a trial")
    concurrent: int | None = Field(None, ge=1, description="trials at once; null takes as many as the machine holds")
    cpus: int = Field(1, ge=1, description="CPU cores a trial, and its threads")
    gpus: float | None = Field(
        None, ge=0, le=1, description="share of a GPU that a trial takes; null: one where there are GPUs"
    )
    seed: int = Field(0, ge=0, description="seed of the searcher's draws; all trials train with the experiment's seed")
    resume: bool = Field(False, description="go on with the search that OUTPUT holds")
    address: str | None = Field(
        None,
        description="Ray cluster to run on, a token that it asks for in RAY_AUTH_TOKEN; null starts Ray here",
    )


class SearchRun(Experiment):
    """An experiment and how to search around it. `space=FILE` is short for `search.space=FILE`, and so on."""

    search: SearchConfig = SearchConfig()

    @model_validator(mode="before")
    @classmethod
    def _short_names(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        short = [key for key in raw if key in SearchConfig.model_fields and key not in cls.model_fields]
        rest = {key: value for key, value in raw.items() if key not in short}
        return merge(rest, {"search": {key: raw[key] for key in short}}) if short else raw

    @property
    def experiment(self) -> Experiment:
        return Experiment(**self.model_dump(exclude={"search"}))

    @property
    def model(self) -> str:
        return self.search.model or next(iter(self.models))

    @property
    def search_folder(self) -> Path:
        return self.folder / "search"

    @property
    def epochs(self) -> int:
        """Epochs of a trial that runs to its end, over all its folds."""
        return len(self.search.folds) * self.models[self.model].train.epochs

    def trial_folder(self, number: int) -> Path:
        return self.search_folder / trial_name(number)


def trial_name(number: int) -> str:
    return f"trial-{number:03d}"


# --- space -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Domain:
    """Where a setting may lie: the ends, both included, of uniform, loguniform and randint; the values of choice."""

    kind: Literal["uniform", "loguniform", "randint", "choice"]
    values: tuple[Any, ...]

    def sample(self, generator: random.Random) -> Any:
        if self.kind == "choice":
            return generator.choice(self.values)
        low, high = self.values
        if self.kind == "randint":
            return generator.randint(low, high)
        if self.kind == "loguniform":
            return math.exp(generator.uniform(math.log(low), math.log(high)))
        return generator.uniform(low, high)

    def __contains__(self, value: Any) -> bool:
        return value in self.values if self.kind == "choice" else self.values[0] <= value <= self.values[1]

    def widened(self, value: Any) -> Domain:
        """The smallest domain of this kind that holds `value` too. Raises ConfigError where there is none."""
        if self.kind == "choice":
            return replace(self, values=(*self.values, value))
        if not _is_number(value) or (self.kind == "loguniform" and value <= 0):
            raise ConfigError(f"the experiment's own value {value!r} fits no {self.kind} range; use uniform or choice")
        return replace(self, values=(min(value, self.values[0]), max(value, self.values[1])))

    def distribution(self) -> Any:
        """The same for Optuna."""
        from optuna import distributions

        if self.kind == "choice":
            return distributions.CategoricalDistribution(self.values)
        if self.kind == "randint":
            return distributions.IntDistribution(*self.values)
        low, high = self.values
        return distributions.FloatDistribution(low, high, log=self.kind == "loguniform")


Space = dict[str, Domain]
"""Dotted settings of a model, like `train.loss.gamma` or `tower.freeze_clinical`, each with its domain."""


def read_space(path: Path) -> Space:
    """The space of a YAML file: `SETTING: {uniform | loguniform | randint: [low, high]}` or `{choice: [...]}`.

    Raises ConfigError naming file and key.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"search.space: {path} is no file; see tune/spaces/") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(f"{path}: a space is a mapping of settings, like train.loss.gamma: {{uniform: [0, 3]}}")
    return {str(key): _domain(f"{path}: {key}", value) for key, value in raw.items()}


def _domain(where: str, raw: Any) -> Domain:
    kinds = ("uniform", "loguniform", "randint", "choice")
    kind, values = next(iter(raw.items())) if isinstance(raw, dict) and len(raw) == 1 else (None, None)
    if kind not in kinds or not isinstance(values, list) or not values:
        raise ConfigError(f"{where}: write one of {', '.join(kinds)} with a list, like {{uniform: [0, 1]}}")
    if kind == "choice":
        if any(isinstance(value, dict | list) for value in values):
            raise ConfigError(f"{where}: choice takes plain values, no lists or mappings")
        return Domain("choice", tuple(dict.fromkeys(values)))
    values = [_as_number(value) for value in values]
    if len(values) != 2 or not all(_is_number(value) for value in values) or not values[0] < values[1]:
        raise ConfigError(f"{where}: {kind} takes two numbers, the lower first")
    if kind == "randint" and not all(isinstance(value, int) for value in values):
        raise ConfigError(f"{where}: randint takes whole numbers")
    if kind == "loguniform" and values[0] <= 0:
        raise ConfigError(f"{where}: loguniform takes numbers above 0")
    return Domain(kind, tuple(values))


def _as_number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text; people write it as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def with_settings(experiment: Experiment, model: str, settings: Mapping[str, Any]) -> Experiment:
    """The experiment with dotted `settings` laid over one of its models. Raises ConfigError as `config.load` does."""
    tree = experiment.model_dump(mode="json")
    for key, value in settings.items():
        tree = merge(tree, nest(["models", model, *key.split(".")], value))
    return build(Experiment, tree)


def own_settings(model: ModelConfig, keys: Iterable[str]) -> dict[str, Any]:
    """The values that dotted settings of a model have now."""
    tree, values = model.model_dump(mode="json"), {}
    for key in keys:
        value: Any = tree
        for part in key.split("."):
            value = value[part]
        values[key] = value
    return values


def fit_space(space: Space, experiment: Experiment, model: str, where: str) -> tuple[Space, list[str]]:
    """The part of a space that has effect in an experiment, widened to its own settings; and what was changed, for
    people.

    Raises ConfigError for an unknown setting (with the nearest right one), for a range that reaches values that a
    setting can't take, and where nothing is left to vary.
    """
    generator = random.Random(0)
    for key, domain in space.items():
        if key == "train.epochs":
            raise ConfigError(f"{where}: train.epochs is the budget of a trial, it can't vary")
        for value in domain.values:
            _try(experiment, model, {key: value}, where)
    _try(experiment, model, {key: domain.sample(generator) for key, domain in space.items()}, where)

    config, notes = experiment.models[model], []
    idle = without_effect(config, space)
    notes += [f"{key} is left out: {why}" for key, why in idle.items()]
    fitted = {key: domain for key, domain in space.items() if key not in idle}
    if not fitted:
        raise ConfigError(f"{where}: no setting of this space has effect here ({'; '.join(notes)})")
    for key, own in own_settings(config, fitted).items():
        if own not in fitted[key]:
            try:
                fitted[key] = fitted[key].widened(own)
            except ConfigError as error:
                raise ConfigError(f"{where}: {key}: {error}") from None
            notes.append(f"{key} is widened to the experiment's own value {own}")
    if config.tower.frozen and any(key.startswith(("tower.", "train.augment.")) for key in fitted):
        notes.append("tower and augment settings change the frozen tower's tokens: trials compute them anew")
    return fitted, notes


def _try(experiment: Experiment, model: str, settings: Mapping[str, Any], where: str) -> None:
    try:
        with_settings(experiment, model, settings)
    except ConfigError as error:
        text = str(error).replace(f"models.{model}.", "").replace("models.NAME.", "")
        raise ConfigError(f"{where}: {text}") from None


def without_effect(model: ModelConfig, keys: Iterable[str]) -> dict[str, str]:
    """Those of the dotted settings that change nothing in this model, each with the reason."""
    train, keys = model.train, list(keys)
    geometry = ("min_scale", "dihedral", "rotation", "brightness", "contrast", "saturation", "tied_views")
    rules: list[tuple[bool, tuple[str, ...], tuple[str, ...], str]] = [
        # whether, the settings it hangs on, the settings without effect, why
        (
            model.tower.frozen,
            ("tower.frozen",),
            (
                "tower.freeze_clinical",
                "tower.freeze_dermoscopic",
                "train.optim.layer_decay",
                "train.activation_checkpointing",
            ),
            "tower.frozen leaves no block of a tower to train",
        ),
        (
            model.tower.frozen and train.augment.token_variants == 0,
            ("tower.frozen", "train.augment.token_variants"),
            tuple(f"train.augment.{name}" for name in geometry),
            "a frozen tower with token_variants 0 sees the plain photos only",
        ),
        (
            train.sampling.kind != "balanced",
            ("train.sampling.kind",),
            ("train.sampling.threshold", "train.sampling.power"),
            "train.sampling.kind is not balanced",
        ),
        (
            train.loss.focal_weight == 0,
            ("train.loss.focal_weight",),
            tuple(f"train.loss.{name}" for name in ("gamma", "alpha", "class_weight_power", "label_smoothing")),
            "train.loss.focal_weight is 0",
        ),
        (
            True,
            (),
            tuple(
                f"train.{name}"
                for name in ("log_every", "save_every", "keep_last", "trackers", "profile", "peak_tflops")
            ),
            "it changes no result",
        ),
    ]  # fmt: skip
    return {
        key: why
        for holds, hangs_on, idle, why in rules
        if holds and not set(hangs_on) & set(keys)
        for key in keys
        if key in idle
    }


# --- a trial ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What is known of a trial: its settings, how far it came and what it scores there.

    macro_f1 (argmax) and official are means over the folds trained so far, each of the epoch whose weights are kept.
    """

    number: int
    settings: dict[str, Any]
    state: State = "running"
    epochs: int = 0
    macro_f1: float | None = None
    official: float | None = None
    seconds: float = 0.0
    error: str = ""

    def write(self, folder: Path) -> None:
        """Write FOLDER/trial.json."""
        write_json(folder / "trial.json", asdict(self))


def read_trial(folder: Path) -> Trial | None:
    """The trial of a folder; None where none has begun. Raises DataError for a trial.json that is no trial."""
    path = folder / "trial.json"
    try:
        return Trial(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a trial ({' '.join(str(error).split())}); delete its folder") from None


def read_trials(folder: Path) -> list[Trial]:
    """All trials of a search folder, by number."""
    found = [read_trial(path) for path in folder.glob("trial-*")]
    return sorted((trial for trial in found if trial), key=lambda trial: trial.number)


class _Curve:
    """The scores of a trial, fold after fold."""

    def __init__(self, select: str) -> None:
        self.select, self.epochs = select, 0
        self._finished: list[dict[str, float]] = []
        self._kept: dict[str, float] | None = None
        self._epoch = 0

    def add(self, epoch: int, scores: dict[str, float]) -> bool:
        """Take the scores of an epoch of the fold; False where it was told before, as it is after a resume."""
        if epoch <= self._epoch:
            return False
        if self._kept is None or self.select == "last" or scores["macro_f1"] > self._kept["macro_f1"]:
            self._kept = scores
        self.epochs, self._epoch = self.epochs + epoch - self._epoch, epoch
        return True

    def end_fold(self) -> None:
        assert self._kept is not None, "a fold ends after an epoch"
        self._finished.append(self._kept)
        self._kept, self._epoch = None, 0

    def mean(self, name: str) -> float:
        scores = [*self._finished, *([self._kept] if self._kept else [])]
        return sum(score[name] for score in scores) / len(scores)


def run_trial(
    trial: Trial,
    experiment: Experiment,
    model: str,
    folds: Sequence[int],
    folder: Path,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Train `folds` of one model with the trial's settings in FOLDER, by what `launch.train` calls; resumes.

    `report` is told {"epoch" (over all folds), "macro_f1", "official"} after every epoch, the last when the
    predictions are written. Leaves FOLDER/trial.json. Shards and tokens are those of the experiment.
    """
    from triderm_dist.data.cache import open_index
    from triderm_dist.engine.crossval import run_folds
    from triderm_dist.engine.tracking import read_metrics

    earlier, started = read_trial(folder), time.monotonic()
    if earlier and earlier.settings != trial.settings:
        shutil.rmtree(folder)  # of a trial that Ray had forgotten when it was killed
        earlier = None
    before = earlier.seconds if earlier else 0.0
    trial.write(folder)
    # Nobody resumes a trial from an older checkpoint than its last.
    own = with_settings(experiment, model, {**trial.settings, "train.keep_last": 1})
    data = own.data.model_copy(update={"shards": experiment.train_shards})
    own = own.model_copy(update={"output": str(folder), "data": data, "tokens": str(experiment.token_folder)})
    train = own.models[model].train
    curve, all_epochs = _Curve(train.select), len(folds) * train.epochs

    def tell(state: State) -> None:
        macro_f1, official = curve.mean("macro_f1"), curve.mean("official")
        seconds = round(before + time.monotonic() - started, 2)
        replace(
            trial, state=state, epochs=curve.epochs, macro_f1=macro_f1, official=official, seconds=seconds
        ).write(folder)  # fmt: skip
        report({"epoch": curve.epochs, "macro_f1": macro_f1, "official": official})

    def on_validation(epoch: int, scores: dict[str, float]) -> None:
        # The last epoch waits for the predictions, since a trial may be stopped as soon as it has reported.
        if curve.add(epoch, scores) and curve.epochs < all_epochs:
            tell("running")

    try:
        index = open_index(own.train_shards, own.data.remote)
        for fold in folds:
            for record in read_metrics(own.fold_folder(model, fold) / "metrics.jsonl"):
                if record["kind"] == "validation":
                    on_validation(int(record["epoch"]), {name: record[name] for name in ("macro_f1", "official")})
            run_folds(own, index, [model], [fold], on_validation)
            curve.end_fold()
        tell("complete")
    except Exception as error:
        text = f"{'' if isinstance(error, InputError) else f'{type(error).__name__}: '}{' '.join(str(error).split())}"
        replace(read_trial(folder) or trial, state="failed", error=text).write(folder)
        raise


# --- the search ------------------------------------------------------------------------------------------------------


def search(run: SearchRun, say: Callable[[str], None]) -> Summary:
    """Run the trials, on this machine or a Ray cluster, and write trials.csv and best.yaml. `say` gets progress.

    Raises ConfigError for settings or a space that can't be used, before any trial; Interrupted where it was stopped.
    """
    settings, experiment, model = run.search, run.experiment, run.model
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("tune.search starts its own processes: run it by python -m tune.search, without a launcher")
    if model not in experiment.models:
        raise ConfigError(f"search.model={model}: the settings have the models {', '.join(experiment.models)}")
    folds = experiment.data.folds
    if len(set(settings.folds)) < len(settings.folds) or not all(0 <= fold < folds for fold in settings.folds):
        raise ConfigError(f"search.folds: each of 0 to {folds - 1} (data.folds is {folds}) may stand there once")
    space, notes = fit_space(read_space(Path(settings.space)), experiment, model, settings.space)
    for note in notes:
        say(f"note: {note}")

    from triderm_dist.data.cache import open_index

    index = open_index(experiment.train_shards, experiment.data.remote, verify=experiment.data.verify)
    _open_folder(run, space)
    _prepare_tokens(experiment, model, index)
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_CHDIR_TO_TRIAL_DIR="0", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1")
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # its tables would drown ours
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")  # the most that Ray forgets when it is killed
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    try:
        _start_ray(settings)
        tuner = _tuner(run, space, say)
        tuner.fit()
    finally:
        ray.shutdown()
    trials = read_trials(run.search_folder)
    ended = sum(trial.state != "running" for trial in trials)
    summary = conclude(run)
    if ended < settings.trials:
        raise Interrupted(f"{ended} of {settings.trials} trials have ended; the same command with resume=true goes on")
    if summary.best is None:
        failed = next((trial for trial in trials if trial.state == "failed"), None)
        raise InputError(
            f"{run.search_folder}: no trial came to its end; the first that failed said: "
            f"{failed.error if failed else 'nothing'}"
        )
    return summary


def _open_folder(run: SearchRun, space: Space) -> None:
    """Begin OUTPUT/search, or check that the search there is the one that is asked for."""
    folder = run.search_folder
    record, written = folder / "search.yaml", folder / "space.yaml"
    if not run.search.resume:
        if read_trials(folder):
            raise ConfigError(f"{folder}: holds a search; go on with it by resume=true, or choose another output")
        shutil.rmtree(folder / "ray", ignore_errors=True)  # of a search that was killed before its first trial
        folder.mkdir(parents=True, exist_ok=True)
        tree = {key: {domain.kind: list(domain.values)} for key, domain in space.items()}
        written.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        save(run, record)
        return
    if not record.exists():
        raise ConfigError(f"{folder}: holds no search to go on with; leave resume=true away")
    before, now = (
        tree.model_dump(exclude={"search": {"resume", "address"}}) for tree in (load(SearchRun, record), run)
    )
    if key := _first_difference(before, now):
        raise ConfigError(f"{key}: differs from the search in {folder}; resume with its settings, see {record}")
    if read_space(written) != space:
        raise ConfigError(f"{run.search.space}: differs from {written}, with which the search was begun")


def _first_difference(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> str | None:
    for key in [*one, *(key for key in other if key not in one)]:
        first, second = one.get(key), other.get(key)
        if isinstance(first, dict) and isinstance(second, dict):
            if found := _first_difference(first, second, f"{prefix}{key}."):
                return found
        elif first != second:
            return f"{prefix}{key}"
    return None


def _prepare_tokens(experiment: Experiment, model: str, index: ShardIndex) -> None:
    """Compute a frozen tower's tokens once, so that the trials find them."""
    config = experiment.models[model]
    if not config.tower.frozen:
        return
    from triderm_dist.engine import parallel
    from triderm_dist.engine.tokens import open_views

    train = config.train
    accelerator = parallel.start(train.precision, train.micro_batch, train.global_batch, train.optim.clip_norm)
    open_views(config, index, experiment.token_folder, accelerator, experiment.data, seed=experiment.seed, train=True)


def _start_ray(settings: SearchConfig) -> None:
    import ray

    library = str(Path(__file__).resolve().parents[1])
    paths = dict.fromkeys([library, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    variables = {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(settings.cpus),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    quiet: dict[str, Any] = {"include_dashboard": False, "logging_level": "error", "log_to_driver": False}
    # "local", since without an address Ray joins whatever cluster was last started on this machine.
    # Nothing large goes through the object store; its default is a third of the memory.
    local: dict[str, Any] = {} if settings.address else {"object_store_memory": 100 * 2**20}
    try:
        ray.init(settings.address or "local", runtime_env={"env_vars": variables}, **quiet, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"search.address={settings.address}: Ray does not start ({' '.join(str(error).split())}); "
            "check the address, and RAY_AUTH_TOKEN where the cluster asks for a token"
        ) from None


def _tuner(run: SearchRun, space: Space, say: Callable[[str], None]) -> Any:
    """A Ray Tuner ready to `fit`: a new one, or that of the killed search."""
    import optuna
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
    from ray.tune.search.optuna import OptunaSearch

    settings, experiment, model, root = run.search, run.experiment, run.model, run.search_folder.resolve()
    here, own = os.getcwd(), own_settings(experiment.models[model], space)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # A resumed trial tells its first epochs again, to Optuna too; failures are told by `_told_by`, in one line each.
    warnings.filterwarnings("ignore", "The reported value is ignored")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)

    def trainable(sampled: dict[str, Any]) -> None:
        import torch

        os.chdir(here)
        torch.set_num_threads(settings.cpus)
        number = int(Path(tune.get_context().get_trial_dir()).name.removeprefix("trial-").partition("_")[0])
        values = own if number == BASELINE else {key: _tidy(value) for key, value in sampled.items()}
        folder = root / trial_name(number)
        run_trial(Trial(number, values), experiment, model, settings.folds, folder, tune.report)

    gpus = settings.gpus
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    needs = {"cpu": float(settings.cpus), "gpu": gpus}
    for name, amount in needs.items():
        most = max((node["Resources"].get(name.upper(), 0.0) for node in ray.nodes()), default=0.0)
        if amount > most:
            raise ConfigError(f"search.{name}s: a trial wants {amount:g}, no machine has more than {most:g}")
    total = ray.cluster_resources()
    fit_in = min(int(total.get(name.upper(), 0) / amount) for name, amount in needs.items() if amount)
    concurrent = settings.concurrent or max(1, min(fit_in, settings.trials))
    with_resources = tune.with_resources(trainable, needs)
    state = str(root / "ray")
    say(f"{settings.trials} trials over {', '.join(space)}, {concurrent} at once")
    if settings.resume and tune.Tuner.can_restore(state):
        ended = [trial for trial in read_trials(root) if trial.state in ("complete", "stopped")]
        say(f"going on after {len(ended)} trials")
        return tune.Tuner.restore(state, with_resources, resume_unfinished=True, resume_errored=True)

    class Asha(ASHAScheduler):
        """ASHA that lets the baseline run to its end, as every gain is measured against it."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            action = super().on_trial_result(tune_controller, trial, result)
            return self.CONTINUE if _number(trial) == BASELINE and action == self.STOP else action

    if settings.scheduler == "asha":
        scheduler: Any = Asha(
            time_attr="epoch", max_t=run.epochs + 1, grace_period=settings.grace_epochs, reduction_factor=REDUCTION
        )
    else:
        scheduler = FIFOScheduler()
    if settings.searcher == "tpe":
        # A third of the trials at random, then by model: the default, 10, is most of a short search.
        sampler: Any = optuna.samplers.TPESampler(seed=settings.seed, n_startup_trials=max(4, settings.trials // 3))
    else:
        sampler = optuna.samplers.RandomSampler(seed=settings.seed)
    searcher = OptunaSearch(
        {key: domain.distribution() for key, domain in space.items()},
        metric="macro_f1", mode="max", points_to_evaluate=[own], sampler=sampler,
    )  # fmt: skip
    return tune.Tuner(
        with_resources,
        tune_config=tune.TuneConfig(
            metric="macro_f1", mode="max", search_alg=searcher, scheduler=scheduler, num_samples=settings.trials,
            max_concurrent_trials=concurrent, trial_dirname_creator=lambda trial: trial_name(_number(trial)),
        ),
        run_config=tune.RunConfig(
            name="ray", storage_path=str(root), verbose=0, callbacks=[_told_by(root, settings.trials, run.epochs)]
        ),
    )  # fmt: skip


def _number(trial: Any) -> int:
    """Ray's count of a trial, from 1."""
    return int(trial.experiment_tag.partition("_")[0])


def _tidy(value: Any) -> Any:
    """Six digits are enough for a setting that people read and write."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _told_by(root: Path, trials: int, epochs: int) -> Any:
    """A Ray callback that says what happens, records how trials end, and drops the checkpoints of ended ones."""
    from ray import tune

    class Told(tune.Callback):
        said = 0.0

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            known = read_trial(root / trial_name(_number(trial)))
            if known and known.state == "running" and time.monotonic() - self.said > 20:
                self._say(known)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._end(trial, "stopped", "")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._end(trial, "failed", "its process died; out of memory?")

        def _end(self, trial: Any, state: State, error: str) -> None:
            folder = root / trial_name(_number(trial))
            known = read_trial(folder) or Trial(_number(trial), dict(trial.config))
            if known.state == "running":
                known = replace(known, state=state, error=error)
                known.write(folder)
            if known.state != "failed":  # that one goes on from them after a resume
                for checkpoints in folder.glob("*/fold-*/checkpoints"):
                    shutil.rmtree(checkpoints, ignore_errors=True)
            self._say(known)

        def _say(self, known: Trial) -> None:
            self.said = time.monotonic()
            score = "" if known.macro_f1 is None else f"  macro F1 {known.macro_f1:.3f}"
            line = f"trial {known.number}/{trials}  epoch {known.epochs}/{epochs}{score}  {known.state}"
            print(f"{line}  {known.error or describe(known.settings)}", flush=True)

    return Told()


# --- what came out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """The trials of a search, best first; the baseline and the best of those that ran to their end, if there are any;
    and the gain of the best in macro F1 (argmax), with an interval over validation lesions.
    """

    folder: Path
    trials: list[Trial]
    baseline: Trial | None
    best: Trial | None
    gain: Interval | None
    lesions: int


def conclude(run: SearchRun) -> Summary:
    """Write OUTPUT/search/trials.csv and, once a trial ran to its end, OUTPUT/best.yaml; also of a search that is
    not over.
    """
    trials = read_trials(run.search_folder)
    complete = [trial for trial in trials if trial.state == "complete"]
    baseline = next((trial for trial in complete if trial.number == BASELINE), None)
    best = max(complete, key=lambda trial: trial.macro_f1 or 0.0, default=None)
    if best is not None:
        save(with_settings(run.experiment, run.model, best.settings), run.folder / "best.yaml")
    _write_table(run.search_folder / "trials.csv", trials, baseline)
    gain, lesions = _gain(run, baseline, best) if baseline and best else (None, 0)
    rank = {"complete": 0, "stopped": 1, "running": 2, "failed": 3}
    ordered = sorted(trials, key=lambda trial: (rank[trial.state], -(trial.macro_f1 or 0.0)))
    return Summary(run.search_folder, ordered, baseline, best, gain, lesions)


def read_search(output: Path) -> SearchRun:
    """The search that a run folder holds. Raises DataError where there is none."""
    record = output / "search" / "search.yaml"
    if not record.exists():
        raise DataError(f"{output}: holds no search; run python -m tune.search first")
    run = load(SearchRun, record)
    return run.model_copy(update={"output": str(output)})  # it may have been copied from elsewhere


def _gain(run: SearchRun, baseline: Trial, best: Trial) -> tuple[Interval, int]:
    """Macro F1 of the best less that of the baseline over the validation lesions of all folds, and their number."""
    import numpy as np

    from triderm_dist.metrics import argmax_decisions, paired_difference
    from triderm_dist.oof import read_predictions

    logits, labels = [], []
    for trial in (best, baseline):
        folder = run.trial_folder(trial.number) / run.model
        parts = [read_predictions(folder / f"fold-{fold}" / "predictions.parquet") for fold in run.search.folds]
        logits.append(argmax_decisions(np.concatenate([part.logits for part in parts])))
        labels.append(np.concatenate([part.labels for part in parts]))
    return paired_difference(logits[0], logits[1], labels[1]), len(labels[1])


def _write_table(path: Path, trials: Sequence[Trial], baseline: Trial | None) -> None:
    keys = list(dict.fromkeys(key for trial in trials for key in trial.settings))
    with whole(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "state", "epochs", "macro_f1", "official", "gain", "seconds", *keys, "error"])
        for trial in trials:
            gain = _gain_over(baseline, trial)
            scores = ["" if value is None else f"{value:.6f}" for value in (trial.macro_f1, trial.official, gain)]
            values = [trial.settings.get(key, "") for key in keys]
            writer.writerow([trial.number, trial.state, trial.epochs, *scores, trial.seconds, *values, trial.error])


def _gain_over(baseline: Trial | None, trial: Trial) -> float | None:
    """Of trials that ran to their end: an earlier epoch says nothing about the last."""
    if baseline is None or baseline.macro_f1 is None or trial.macro_f1 is None or trial.state != "complete":
        return None
    return trial.macro_f1 - baseline.macro_f1


def describe(settings: Mapping[str, Any]) -> str:
    """Settings on one line, by the last part of their names."""
    return "  ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in settings.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_summary(summary: Summary) -> None:
    """The table of trials, the best settings, and how sure the gain is, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"trials of {summary.folder}", title_justify="left")
    for name in ("trial", "epochs", "macro F1", "gain", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("settings", overflow="fold")
    for trial in summary.trials:
        over = _gain_over(summary.baseline, trial)
        style = "bold green" if trial is summary.best else "dim" if trial.state != "complete" else ""
        table.add_row(
            str(trial.number), str(trial.epochs), "" if trial.macro_f1 is None else f"{trial.macro_f1:.3f}",
            "baseline" if trial.number == BASELINE else "" if over is None else f"{over:+.3f}", f"{trial.seconds:.0f}",
            trial.state, trial.error or describe(trial.settings), style=style,
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    best, gain = summary.best, summary.gain
    if best is None:
        return
    if best.number == BASELINE:
        console.print("no trial beats the experiment's own settings")
    elif gain is None:
        console.print(f"best: trial {best.number}; the baseline did not come to its end, so the gain is not known")
    else:
        beyond = "beyond" if gain.low > 0 else "within"
        console.print(
            f"best: trial {best.number}, {gain.value:+.3f} over the baseline on {summary.lesions} validation lesions, "
            f"95 % interval over lesions [{gain.low:+.3f}, {gain.high:+.3f}]: {beyond} the noise of the lesions"
        )
        console.print(
            f"the best of {sum(trial.state == 'complete' for trial in summary.trials)} on the lesions that chose it: "
            "expect less on new ones; training noise (other seeds) comes on top"
        )
    console.print(f"{summary.folder.parent / 'best.yaml'}: python -m launch.train --config takes it")


def draw_summary(summary: Summary) -> list[Path]:
    """Draw SEARCH/settings.png, the score against each setting, and SEARCH/parallel.png, each trial a line through its
    settings; no picture where no trial has a score.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from triderm_dist.report.figures import STYLE

    trials = [trial for trial in summary.trials if trial.macro_f1 is not None]
    if not trials:
        return []
    # Every trial has the same settings.
    axes = [_Axis(key, domain) for key, domain in read_space(summary.folder / "space.yaml").items()]
    rows = math.ceil(len(axes) / 3)
    pictures: list[tuple[str, tuple[float, float], Callable[..., None]]] = [
        ("settings", (10.0, 0.6 + 2.8 * rows), _draw_settings),
        ("parallel", (2.2 + 1.5 * len(axes), 5.2), _draw_parallel),
    ]
    paths = []
    with matplotlib.rc_context(dict[Any, Any](STYLE)):
        for name, size, draw in pictures:
            figure = Figure(figsize=size, layout="constrained")
            draw(figure, axes, trials, summary)
            paths.append(summary.folder / f"{name}.png")
            figure.savefig(paths[-1])
    return paths


class _Axis:
    """One setting on a picture: where a value lies between 0 and 1, and the ticks."""

    def __init__(self, key: str, domain: Domain) -> None:
        self.key, self.domain = key, domain
        self.title = key.removeprefix("train.").replace(".", "\n")

    def place(self, value: Any) -> float:
        if self.domain.kind == "choice":
            return self.domain.values.index(value) / max(1, len(self.domain.values) - 1)
        low, high = (self._scale(end) for end in self.domain.values)
        return (self._scale(value) - low) / (high - low)

    def ticks(self) -> tuple[list[float], list[str]]:
        values = list(self.domain.values)
        if self.domain.kind != "choice":
            low, high = values
            middle = math.sqrt(low * high) if self.domain.kind == "loguniform" else (low + high) / 2
            values = [low, middle, high] if self.domain.kind != "randint" else [low, high]
        texts = [f"{value:.2g}" if isinstance(value, float) else str(value) for value in values]
        return [self.place(value) for value in values], texts

    def _scale(self, value: float) -> float:
        return math.log(value) if self.domain.kind == "loguniform" else float(value)


def _draw_settings(figure: Any, axes: list[_Axis], trials: list[Trial], summary: Summary) -> None:
    from triderm_dist.report.figures import BLUE, GREY, INK, ORANGE

    columns = min(3, len(axes))
    grid = figure.subplots(math.ceil(len(axes) / columns), columns, squeeze=False, sharey=True)
    kinds = [
        ("stopped early (at an earlier epoch)", [t for t in trials if t.state != "complete"], GREY, "x", 30),
        ("ran to the end", [t for t in trials if t.state == "complete"], BLUE, "o", 36),
        ("the experiment's own settings", [t for t in trials if t.number == BASELINE], INK, "D", 60),
        ("best", [t for t in trials if t is summary.best], ORANGE, "*", 160),
    ]
    for place, axis in zip(grid.flat, axes, strict=False):
        for label, some, colour, marker, size in kinds:
            x, y = [axis.place(trial.settings[axis.key]) for trial in some], [trial.macro_f1 for trial in some]
            place.scatter(x, y, size, colour, marker, label=label, zorder=3)
        place.set_xticks(*axis.ticks())
        place.set_xlim(-0.05, 1.05)
        place.set_xlabel(axis.key.removeprefix("train.") + (" (log)" if axis.domain.kind == "loguniform" else ""))
    for place in grid.flat[len(axes) :]:
        place.set_axis_off()
    for row in grid:
        row[0].set_ylabel("macro F1 (argmax)")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)


def _draw_parallel(figure: Any, axes: list[_Axis], trials: list[Trial], summary: Summary) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    from triderm_dist.report.figures import GREY, INK, ORANGE

    place = figure.subplots()
    scores = [trial.macro_f1 or 0.0 for trial in trials]
    low, high = min(scores), max(scores)
    colours = ScalarMappable(Normalize(low, high), "viridis_r")
    at = range(len(axes))
    # Low scores first, so that the good ones lie on top.
    for trial in sorted(trials, key=lambda trial: trial.macro_f1 or 0.0):
        ends = trial.state == "complete"
        shade = ((trial.macro_f1 or 0.0) - low) / ((high - low) or 1.0)
        style: dict[str, Any] = {"color": colours.cmap(shade), "lw": 1.6 if ends else 0.9}
        style["linestyle"] = "-" if ends else ":"
        if trial.number == BASELINE:
            style |= {"color": INK, "lw": 2.2, "linestyle": "--", "label": "the experiment's own settings"}
        if trial is summary.best:
            own = ": the experiment's own settings" if trial.number == BASELINE else ""
            style |= {"color": ORANGE, "lw": 3.0, "label": f"best{own}"}
        place.plot(at, [axis.place(trial.settings[axis.key]) for axis in axes], **style)
    for x, axis in enumerate(axes):
        for y, text in zip(*axis.ticks(), strict=True):
            place.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK,
                           bbox={"facecolor": "white", "alpha": 0.75, "pad": 0.8, "edgecolor": "none"})  # fmt: skip
        place.axvline(x, color=GREY, lw=1, zorder=0)
    place.set_xticks(list(at), [axis.title for axis in axes])
    place.set_yticks([])
    place.grid(False)
    place.spines[["left", "bottom"]].set_visible(False)
    place.set_xlim(-0.15, len(axes) - 0.5)
    figure.colorbar(colours, ax=place, label="macro F1 (argmax); dotted: stopped early", pad=0.02)
    if handles := place.get_legend_handles_labels()[0]:
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
