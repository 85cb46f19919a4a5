"""Every recipe of docs/extending.md is trained as printed, killed, resumed on two ranks, and used to predict.

A section of the page with `<!-- recipe: NAME -->` has fenced blocks whose first line is a file name (`# my_sgd.py`);
`# experiment.yaml` overrides a tiny experiment, and `# my_task.yaml` adds fields to the task of MILK10k. Recipes of one
group of `GROUPS` share an experiment. To add a recipe, add its name to a group, and write a function `@check(NAME)`
that verifies its effect. A recipe without training is in no group: its function gets the folder with its files.
"""

import csv
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from safetensors.torch import load_file

from tests.conftest import draw_photo, write_challenge
from tests.fork_server import fork_python
from tests.processes import HANG_SECONDS
from triderm_dist.commands.ranks import expand_names
from triderm_dist.config import Experiment, load
from triderm_dist.data.augment import AUGMENTATIONS, LesionRng, PhotoTransform, lesion_keys
from triderm_dist.data.readers.source import READERS
from triderm_dist.data.shards.index import read_index
from triderm_dist.engine.trained_network import TrainedNetwork
from triderm_dist.engine.warm_start import transfer_weights
from triderm_dist.ensemble.fitted_stacker import STACKERS, FittedStacker, fit_stacker
from triderm_dist.ensemble.run_files import read_nested
from triderm_dist.ensemble.stack_inputs import base_columns, column_names
from triderm_dist.ensemble.stacker import TrainingRows
from triderm_dist.losses import LOSS_TERMS
from triderm_dist.metrics import METRICS
from triderm_dist.models import NETWORKS, build_network, build_towers
from triderm_dist.models.towers import TOWER_SOURCES
from triderm_dist.monitoring.metrics_log import read_metrics
from triderm_dist.optim import OPTIMIZERS, SCHEDULES
from triderm_dist.predictions import read_oof, read_predictions
from triderm_dist.settings import merge
from triderm_dist.tasks import SHIPPED

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
GROUPS = (
    ("loss-term", "sgd", "scheduler", "tracker", "metadata-number", "report-metric", "report-section"),
    ("muon", "augmentation", "metadata-category", "network", "stacker", "tower"),
)
"""Groups of recipes that share an experiment; each must have a separate effect. The second is slow."""
SLOW = pytest.mark.slow
STRATEGIES = ("ddp", "fsdp2")
"""The strategy under which each group is resumed on two ranks."""
EXPERIMENT = """\
data: {folds: 2, short_side: null}
train:
  epochs: 3
  keep_checkpoints: true
  global_batch: 16
  micro_batch: 4
  log_every: 1
  save_every: 1
  trackers: []
  optim: {lr: 1e-3, warmup_epochs: 1}
models:
  trimodal:
    width: 16
    heads: 2
    tower: {source: "timm:test_vit", pretrained: false, image_size: 32, freeze_clinical: 5, freeze_dermoscopic: 5}
stack: {max_rounds: 5}
ensemble: {bootstrap: 20, rounds: 3}
predict: {transforms: 1}
"""
KILL = """\
import os
import signal
import threading
import torch
from triderm_dist.engine.background_writer import WRITER
from triderm_dist.models.network import Network

left = int(os.environ.get("KILL_AT_FORWARD", "0"))


def count(module, inputs):
    global left
    if isinstance(module, Network) and module.training:
        left -= 1
        if left == 0:
            for thread in threading.enumerate():  # a checkpoint that is being written is finished first
                if thread.name == WRITER:
                    thread.join()
            os.kill(os.getpid(), signal.SIGKILL)


torch.nn.modules.module.register_module_forward_pre_hook(count)
"""
KILL_AT = 21
"""Number of training forwards, in step 3: a step has 4 micro-batches with one forward for the sums and one more."""
COLUMNS: dict[str, Callable[[int], Any]] = {
    "diameter_mm": lambda lesion: "" if lesion % 9 == 0 else 1.5 + lesion % 20,
    "itches": lambda lesion: ("TRUE", "no", "")[lesion % 3],
}
"""Columns that recipes add to the metadata table: name, and function from lesion number to cell."""


def recipes() -> dict[str, dict[str, str]]:
    """Return {recipe: {file name: content}}; ignores sections without fenced blocks."""
    found = {}
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE):
        if name := re.search(r"<!-- recipe: (\S+) -->", section):
            blocks = re.findall(r"^```\w+\n(?:#|//) (\S+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
            if blocks:
                found[name[1]] = dict(blocks)
    return found


RECIPES = recipes()


@dataclass(frozen=True)
class Run:
    """The experiment of a group: output folder, merged settings, and output of the resumed pipeline."""

    folder: Path
    settings: dict[str, Any]
    output: str

    def fold(self, model: str = "trimodal", fold: int = 0) -> Path:
        return self.folder / model / f"fold-{fold}"

    def metrics(self, kind: str = "train", **of: Any) -> list[dict[str, Any]]:
        return [line for line in read_metrics(self.fold(**of) / "metrics.jsonl") if line["kind"] == kind]

    def optimizer_state(self, **of: Any) -> dict[str, Any]:
        """Return the optimizer tensors of the newest checkpoint."""
        return load_file(max((self.fold(**of) / "checkpoints").iterdir()) / "optimizer.safetensors")


CHECKS: dict[str, Callable[[Any], None]] = {}


def check(name: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function that verifies the effect of a recipe on a `Run`, or in the folder if it has no group."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        CHECKS[name] = function
        return function

    return register


# --- the checks -------------------------------------------------------------------------------------------------------


@check("launcher")
def _(folder: Path) -> None:
    """Simulate a scheduler with two nodes; a fake `triderm` records its options and exits with each code in turn."""
    (folder / "nodes").write_text("node-a\nnode-a\nnode-b\n")
    (folder / ".bash_profile").write_text(f"PATH={folder}:$PATH\n")
    environment = {"PBS_O_WORKDIR": str(folder), "PBS_NODEFILE": str(folder / "nodes"), "PBS_JOBID": "1234.server"}
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}
    environment["WORDS"] = "train --config demo fold=0"
    for status in (0, 2, 3):
        for name, text in {
            "triderm": f'echo "$@" >> {folder}/ranks-{status}; exit {status}',
            "pbsdsh": 'shift 3; exec "$@"',
            "qsub": f'echo "$@" >> {folder}/queue-{status}',
        }.items():
            (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (folder / name).chmod(0o755)
        done = subprocess.run(["bash", str(folder / "my_pbs.sh")], env=environment, timeout=HANG_SECONDS)
        assert done.returncode == status
        assert (folder / f"queue-{status}").exists() == (status == 3)
    lines = (folder / "ranks-0").read_text().splitlines()
    options = [launch_command_parser().parse_args(expand_names(line.split()[1:])) for line in lines]
    assert sorted(each.machine_rank for each in options) == [0, 1]
    for each in options:
        assert (each.num_machines, each.num_processes, each.main_process_ip) == (2, 16, "node-a")
        assert (each.main_process_port, each.training_script) == (21234, "triderm_dist.commands.train")
        assert each.training_script_args == ["--config", "demo", "fold=0"]


@check("loss-term")
def loss_term(run: Run) -> None:
    for line in run.metrics():
        assert 0 < line["poly1"] < 2 and 0 < line["tversky"] < 1
        terms = 0.5 * (line["focal"] + line["soft_f1"]) + 0.2 * line["poly1"] + 0.3 * line["tversky"]
        assert line["loss"] == pytest.approx(terms + 0.3 * line["aux"])


@check("sgd")
def sgd(run: Run) -> None:
    assert {key.partition("/")[0] for key in run.optimizer_state()} == {"momentum_buffer"}


@check("scheduler")
def scheduler(run: Run) -> None:
    rates = [line["lr"] for line in run.metrics()]
    warmed_up, highest = rates.index(max(rates)), max(rates)
    stable = [rate for rate in rates[warmed_up:] if rate == pytest.approx(highest)]
    assert len(stable) >= 0.6 * len(rates[warmed_up:]) and rates[-1] < 1e-5


@check("muon")
def muon(run: Run) -> None:
    keys = {key.partition("/")[0] for key in run.optimizer_state()}
    assert keys == {"momentum", "mean", "square"}
    assert run.metrics()[-1]["loss"] < run.metrics()[0]["loss"]


@check("tracker")
def tracker(run: Run) -> None:
    with (run.fold() / "metrics.csv").open() as file:
        rows = list(csv.reader(file))
    last = run.metrics()[-1]
    assert [str(last["step"]), "train/loss", str(last["loss"])] in rows
    assert any(name == "validation/macro_f1" for _, name, _ in rows)


@check("augmentation")
def augmentation(run: Run) -> None:
    """The saved settings erase a fifth of each photo."""
    experiment = load(Experiment, run.folder / "config.yaml")
    augment = experiment.models["trimodal"].train.augment
    rng, photos = LesionRng(0, 0, lesion_keys("abcd"), np.zeros(4)), torch.zeros((4, 32, 32, 3), dtype=torch.uint8)
    with_plugin = PhotoTransform(20, augment)(photos, "clinical", rng)
    without = PhotoTransform(20, augment.model_copy(update={"extra": {}}))(photos, "clinical", rng)
    assert (without == 0).all()
    assert (with_plugin == 0.5).sum((1, 2, 3)).tolist() == [3 * 9 * 9] * 4


@check("metadata-number")
def metadata_number(run: Run) -> None:
    values = added_field(run, "diameter")
    assert np.isnan(values).sum() == 8 and np.nanmin(values) == 1.5 and np.nanmax(values) == 20.5
    assert "semantic.diameter.curve" in load_file(run.fold() / "weights.safetensors")
    report = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "diameter (mm)" in report and "6 to under 10" in report


@check("metadata-category")
def metadata_category(run: Run) -> None:
    values = added_field(run, "itch")
    assert [(values == value).sum() for value in (0, 1)] == [22, 22] and np.isnan(values).sum() == 22
    assert "semantic.categories.itch.embedding.weight" in load_file(run.fold() / "weights.safetensors")


@check("source-reader")
def source_reader(folder: Path) -> None:
    """Folders of photos are packed with their names as labels, and a folder of another name is refused."""
    for at, name in enumerate(("melanomas", "nevi", "Moles")):
        (folder / "photos" / name).mkdir(parents=True)
        draw_photo(at).save(folder / "photos" / name / f"photo_{at}.jpg")
    pack = ["triderm_dist.commands.pack", "source=photos", "output=packed", "task=my_task.yaml"]
    done = program(folder, *pack, "plugins=[my_reader.py]")
    assert done.returncode == 0, done.stderr
    index = read_index(folder / "packed")
    assert dict(zip(index.lesion_ids, index.labels.tolist(), strict=True)) == {"photo_0": 0, "photo_1": 1, "photo_2": 1}
    (folder / "photos" / "nevi").rename(folder / "photos" / "warts")
    refused = program(folder, *pack, "plugins=[my_reader.py]")
    assert refused.returncode == 2 and "warts: names no diagnosis" in refused.stderr
    unknown = program(folder, *pack)
    assert unknown.returncode == 2 and "reader 'folders' is unknown; known are" in unknown.stderr


@check("network")
def network(run: Run) -> None:
    predictions = read_predictions(run.fold("late") / "predictions.parquet")
    weighted = 0.3 * predictions.aux_clinical + 0.7 * predictions.aux_dermoscopic
    np.testing.assert_allclose(predictions.logits, weighted, rtol=1e-4, atol=1e-5)
    assert predictions.features.shape[1] == 2 * 32
    settings = load(Experiment, run.folder / "config.yaml").models["late"]
    source = TrainedNetwork.read(run.fold("late"))
    signature = replace(source.signature, diagnoses=source.signature.diagnoses[::-1])
    other = build_network(settings, signature, build_towers(settings.tower, signature.views))
    transfer = transfer_weights(other, settings, source)
    assert {name.partition(".")[0] for name in transfer.taken} == {"towers", "views"}
    assert {name.partition(".")[0] for name in transfer.new} == {"heads"}


@check("stacker")
def stacker(run: Run) -> None:
    """The plugin stacks and predicts; its saved file predicts the same as a new fit on the out-of-fold table."""
    config = load(Experiment, run.folder / "config.yaml").stack
    description = json.loads((run.folder / "stack.json").read_text())
    assert description["kind"] == "logistic" and not (run.folder / "stack.ubj").exists()
    fitted = FittedStacker.load(run.folder / "stack.json")
    table = read_oof(run.folder / "oof.parquet")
    columns = base_columns(table)
    rows = np.arange(len(table))
    rows = TrainingRows(columns, rows, table.labels, table.groups, column_names(table), table.diagnoses)
    again = fit_stacker(rows, config)
    np.testing.assert_array_equal(fitted.predict(columns), again.predict(columns))
    assert (run.folder / "submission.csv").exists()
    report = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "logistic regression stacker" in report and "Stack.max_rounds has no effect" in report


@check("report-section")
def report_section(run: Run) -> None:
    rows = read_nested(run.folder / "ensemble_oof.parquet")
    doubtful = rows.probabilities[rows.folds == 0].max(axis=1) < 0.5
    report = (run.folder / "report.html").read_text(encoding="utf-8")
    assert (
        f"<p>In fold 0: {doubtful.sum()} of {len(doubtful)} (" in report and 'id="figure-largest_probability"' in report
    )
    assert (run.folder / "report" / "doubt.csv").read_text().startswith("fold,lesions,lesions_of\n")
    assert "<rdf:RDF" not in report and (run.folder / "report" / "largest_probability.svg").is_file()


@check("report-metric")
def report_metric(run: Run) -> None:
    rows = read_nested(run.folder / "ensemble_oof.parquet")
    share = (rows.decisions.sum(axis=1) == 1).mean()
    report = (run.folder / "report.html").read_text(encoding="utf-8")
    assert f"Lesions with exactly one predicted diagnosis</th><td>{share:.3f} <span" in report


@check("tower")
def tower(run: Run) -> None:
    weights = load_file(run.fold() / "weights.safetensors")
    assert weights["towers.dermoscopic.blocks.1.0.weight"].shape == (16, 16, 3, 3)


def added_field(run: Run, name: str) -> np.ndarray:
    """Return (N,) values of the field in the out-of-fold table."""
    table = read_oof(run.folder / "oof.parquet")
    assert table.task.field_names[4:] == (name,)
    return table.metadata[:, 4]


# --- the harness ------------------------------------------------------------------------------------------------------


def program(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `python -m ARGUMENTS` in a folder."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [fork_python(), "-m", *arguments],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )


def write_recipes(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Write the files of recipes into a folder; return the tiny experiment overridden by all fragments."""
    settings, plugins = yaml.safe_load(EXPERIMENT), ["kill.py"]
    (folder / "kill.py").write_text(KILL)
    for name in names:
        for file, content in RECIPES[name].items():
            if file == "my_task.yaml":
                shipped = yaml.safe_load((SHIPPED / "milk10k.yaml").read_text(encoding="utf-8"))
                shipped["fields"] += yaml.load(content, yaml.BaseLoader)["fields"]
                (folder / file).write_text(yaml.safe_dump(shipped))
            elif file != "experiment.yaml":
                (folder / file).write_text(content)
        fragment = yaml.safe_load(RECIPES[name].get("experiment.yaml", "{}"))
        plugins += fragment.pop("plugins", [])
        settings = merge(settings, fragment)
    settings["plugins"] = plugins
    (folder / "experiment.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return settings


def write_photos(folder: Path) -> None:
    """Write FOLDER/train with 66 labeled lesions, and FOLDER/test with 22 unlabeled ones."""
    for name, prefix, lesions in (("train", "MILK10k_Training", 66), ("test", "MILK10k_Test", 22)):
        challenge = write_challenge(folder / name, lesions, prefix, labeled=name == "train")
        for number, row in enumerate(challenge.metadata):
            row.update({column: cell(number // 2) for column, cell in COLUMNS.items()})
        challenge.write()


@pytest.fixture(autouse=True, scope="module")
def restore_tables():
    """Restore the tables of the library, since checks that load settings import plugins into this process."""
    tables = (
        *(AUGMENTATIONS, LOGGER_TYPE_TO_CLASS, LOSS_TERMS, METRICS, NETWORKS, OPTIMIZERS, READERS, SCHEDULES),
        *(STACKERS, TOWER_SOURCES),
    )
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Callable[[int], Run]:
    """Return `runs(number)`: the run of that group, killed in training and resumed on two ranks; cached."""
    made: dict[int, Run] = {}

    def run(number: int) -> Run:
        if number not in made:
            folder = tmp_path_factory.mktemp("recipes")
            settings = write_recipes(folder, tuple(name for name in GROUPS[number] if name in RECIPES))
            write_photos(folder)
            pipeline = [
                "triderm_dist.commands.pipeline", "--config", "experiment.yaml", "output=run", "data.source=train",
                "data.test=test",
            ]  # fmt: skip
            killed = program(folder, *pipeline, KILL_AT_FORWARD=str(KILL_AT))
            assert killed.returncode == 128 + signal.SIGKILL, killed.stdout + killed.stderr
            assert any((folder / "run").glob("*/fold-0/checkpoints/*/state.json")), killed.stdout + killed.stderr
            launcher = yaml.safe_load((ROOT / "accelerate_configs" / f"{STRATEGIES[number]}.yaml").read_text())
            (folder / "two_ranks.yaml").write_text(yaml.safe_dump(launcher | {"num_processes": 2}))
            resumed = program(folder, *pipeline, "launcher=two_ranks.yaml")
            assert resumed.returncode == 0, resumed.stdout[-5000:] + resumed.stderr[-3000:]
            made[number] = Run(folder / "run", settings, resumed.stdout)
        return made[number]

    return run


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW if name in GROUPS[1] else ()) for name in RECIPES])
def test_recipe_has_its_effect(name, runs, tmp_path):
    """The recipe is trained, killed, resumed and predicted (if in a group), and has its effect."""
    numbers = [number for number, group in enumerate(GROUPS) if name in group]
    if not numbers:
        for file, content in RECIPES[name].items():
            (tmp_path / file).write_text(content)
    CHECKS[name](runs(numbers[0]) if numbers else tmp_path)


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=SLOW)])
def test_resume_on_two_ranks_equals_the_uninterrupted_training(runs, number):
    """All state of custom optimizers, losses and schedules is restored, independently of the split of the batch."""
    run = runs(number)
    shards = run.folder / "shards" / "train"
    model = next(iter(run.settings["models"]))
    uninterrupted = program(
        run.folder.parent,
        "triderm_dist.commands.train",
        "--config",
        "experiment.yaml",
        "output=uninterrupted",
        f"data.shards={shards}",
        f"model={model}",
    )
    assert uninterrupted.returncode == 0, uninterrupted.stdout + uninterrupted.stderr
    expected_run = Run(run.folder.parent / "uninterrupted", run.settings, uninterrupted.stdout)
    got, expected = run.metrics(model=model), expected_run.metrics(model=model)
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    for line, other in zip(got, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4), line["step"]
