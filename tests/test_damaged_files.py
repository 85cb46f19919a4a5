"""Every file of a run, damaged in every way: the programs that read it name it in one line, or need it not."""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import triderm_dist
from tests.test_run_folder import program
from triderm_dist.checksums import KEY
from triderm_dist.cli import read_settings
from triderm_dist.commands import crossval as crossval_program
from triderm_dist.commands import predict as predict_program
from triderm_dist.commands import refit as refit_program
from triderm_dist.commands import stack as stack_program
from triderm_dist.commands.report import ReportRun
from triderm_dist.config import TrainConfig
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.data.token_cache import TokenCache
from triderm_dist.distributed.out_of_memory import MicroBatch
from triderm_dist.engine.clean import find_removable
from triderm_dist.engine.locate import locate_run
from triderm_dist.engine.network_files import read_info, read_weights, save_weights, write_info
from triderm_dist.ensemble.fitted_stacker import FittedStacker
from triderm_dist.ensemble.model_card import card_text
from triderm_dist.ensemble.run_files import read_nested
from triderm_dist.ensemble.run_list import find_runs
from triderm_dist.files import write_json
from triderm_dist.inference.export import export_run
from triderm_dist.inference.run_folder import open_run_folder
from triderm_dist.predictions import read_predictions, write_predictions
from triderm_dist.report.content import Content
from triderm_dist.report.extra_sets import extra_sets
from triderm_dist.schema import CheckpointError, DataError, InputError
from triderm_dist.search.trial import Trial, read_trial

Damage = Callable[[Path], None]


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def not_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def other_json(text: str) -> Damage:
    def damage(path: Path) -> None:
        path.write_text(text)

    return damage


DAMAGES: dict[str, Damage] = {
    **{each.__name__: each for each in (empty, cut, garbage, zeros, not_utf8, folder)},
    "a list": other_json("[1, 2]"),
    "a number": other_json("3"),
    "no keys": other_json("{}"),
    "deep": other_json("[" * 100_000),
}


def changes_of(content: dict) -> Iterator[tuple[str, dict]]:
    """Yield a JSON mapping without its checksum, and without each of its keys or with a value of another type."""
    content = {key: value for key, value in content.items() if key != KEY}
    for key, value in content.items():
        yield f"without {key}", {name: each for name, each in content.items() if name != key}
        for other in (None, {"a": [1]}, "text", [[]], -1):
            if type(other) is not type(value):
                yield f"{key}={other!r}", {**content, key: other}


def fault(program: Callable[[Path], object], run: Path, path: Path) -> str:
    """Return "" where a program works on a run with a damaged file, or refuses in one line that names it; else the
    fault.
    """
    try:
        program(run)
    except (InputError, OSError) as error:
        text = str(error)
        return "" if path.name in text and "\n" not in text else f"{type(error).__name__}: {text}"
    except Exception as error:  # would be a traceback
        return f"{type(error).__name__}: {error}"
    return ""


def predict(run: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    triderm_dist.load(run, device="cpu").predict(dermoscopic=photo, tta=1)


def open_run(run: Path) -> None:
    assert open_run_folder(run).fitted.stacker


def packed(run: Path) -> None:
    program(predict_program, f"run={run}")


def stack(run: Path) -> None:
    program(stack_program, f"run={run}")


def refit(run: Path) -> None:
    program(refit_program, f"run={run}")


def crossval(run: Path) -> None:
    program(crossval_program, f"run={run}")


def report(run: Path) -> None:
    """Read all that the report and the model card show, without drawing."""
    config = read_settings(ReportRun, [f"run={run}"])
    content = Content(run)
    for name in (
        "scores",
        "held_out",
        "settings",
        "transforms",
        "synthetic",
        "training_curves",
        "stacker",
        "importance",
    ):
        getattr(content, name)
    extra_sets(run, content.networks)
    card_text(config, run)


def export(run: Path) -> None:
    (run.parent / "run.zip").unlink(missing_ok=True)
    export_run(run, run.parent / "run.zip", report=lambda line: None)


def listed(run: Path) -> None:
    find_runs(run.parent)
    find_removable(run)


READERS = (listed, open_run, report)
"""Programs that read a run in well under a second."""
PROGRAMS = (listed, report, predict, packed, export, stack, refit, crossval)


@pytest.fixture(scope="module")
def run(trained_run, tmp_path_factory) -> Path:
    """A copy of a trained run; each test restores what it damages."""
    return shutil.copytree(trained_run.folder, tmp_path_factory.mktemp("damaged") / "run")


@contextmanager
def damaged(path: Path, damage: Damage) -> Iterator[None]:
    """Damage a file, and restore it."""
    content = path.read_bytes()
    try:
        damage(path)
        yield
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)


FILES = ("config.yaml", "ensemble.json", "stack.json", "stack.ubj", "oof.parquet", "ensemble_oof.parquet",
         "environment.json", "tri/fold-0/fold.json", "tri/fold-0/metrics.jsonl")  # fmt: skip
NEEDED = {"config.yaml", "ensemble.json", "stack.json", "stack.ubj", "tri/fold-0/fold.json"}
"""Files without which a run is not opened."""


@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_named_or_not_needed(run, name):
    path = run / name
    for how, damage in DAMAGES.items():
        for read in READERS:
            with damaged(path, damage):
                assert not fault(read, run, path), (how, read.__name__)
    if name in NEEDED - {"config.yaml"}:  # an empty one is that of default settings
        with damaged(path, empty), pytest.raises(InputError, match=rf"{path.name}.*(again|first)"):
            open_run(run)


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["ensemble.json", "stack.json", "environment.json", "tri/fold-0/fold.json"])
def test_json_of_other_keys_and_types_is_named_or_not_needed(run, name, step):
    """step: every ninth change, or all."""
    path = run / name
    for how, content in islice(changes_of(json.loads(path.read_text())), 0, None, step):
        with damaged(path, other_json(json.dumps(content))):
            for read in (listed, report if name == "environment.json" else open_run):
                assert not fault(read, run, path), (how, read.__name__)


def test_parquet_of_another_table_is_named(run):
    """Undamaged files under the names of others, and tables with other columns, types and empty cells."""
    oof, nested = run / "oof.parquet", run / "ensemble_oof.parquet"
    with damaged(nested, lambda path: path.write_bytes(oof.read_bytes())):
        assert not fault(report, run, nested)
    table = pq.read_table(nested).replace_schema_metadata(None)
    for name in table.column_names:
        position = table.column_names.index(name)
        others = {
            "missing": table.drop_columns(name),
            "empty": table.set_column(position, name, pa.nulls(len(table), table[name].type)),
            "other": table.set_column(position, name, pa.array([b"bytes"] * len(table))),
        }
        for how, other in others.items():
            with damaged(nested, partial(write_parquet, other)):
                with pytest.raises(DataError, match=rf"ensemble_oof.parquet: column '{name}' .*triderm stack again"):
                    read_nested(nested)
                assert not fault(report, run, nested), (name, how)


def write_parquet(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path)


def test_files_of_another_fit_are_refused(run, tmp_path):
    """Each is undamaged: written by an interrupted `triderm stack`, or copied from another run."""
    other = shutil.copytree(run, tmp_path / "run")
    program(stack_program, f"run={other}", "stack.learning_rate=0.7")
    for names, read in ((("stack.json", "stack.ubj"), open_run), (("ensemble_oof.parquet",), report)):
        with ExitStack() as files:
            for name in names:
                files.enter_context(damaged(run / name, partial(write_bytes, (other / name).read_bytes())))
            with pytest.raises(DataError, match=f"^{run / names[0]}: not written together with ensemble.json; .*again"):
                read(run)
        read(run)


@pytest.mark.parametrize(
    ("name", "change", "read", "message"),
    [
        ("ensemble.json", {"members": [], "weights": [], "temperatures": []}, open_run, "members: .*at least 1 item"),
        ("ensemble.json", {"weights": [5, -4, 0]}, open_run, "weights.0: .*less than or equal"),
        ("ensemble.json", {"temperatures": [0, 1, 1]}, open_run, "temperatures.0: .*greater than 0"),
        ("ensemble.json", {"thresholds": [float("nan")] * 11}, open_run, "thresholds.0: input should be"),
        ("ensemble.json", {"diagnoses": ["MEL", "NV"]}, open_run, "its diagnoses are not those of its task"),
        ("stack.json", {"diagnoses": ["MEL", "NV"]}, open_run, "its diagnoses are not those of its task"),
        ("tri/fold-0/fold.json", {"photos": {"canvas": [0, 5], "short_side": None}}, open_run, "photos.canvas.0: "),
        ("tri/fold-0/weights.json", {"epoch": 99}, refit, "epoch 99 of 1"),
    ],
)
def test_impossible_values_without_a_checksum_are_named(run, name, change, read, message):
    content = {key: value for key, value in json.loads((run / name).read_text()).items() if key != KEY}
    change_file = other_json(json.dumps({**content, **change}))
    refused = pytest.raises(InputError, match=rf"{Path(name).name}: .*{message}.* again")
    with damaged(run / name, change_file), refused:
        read(run)


def test_files_of_another_network_are_refused_or_written_again(run, capsys):
    fold = run / "tri" / "fold-0"
    names = ("weights.safetensors", "weights.json", "fold.json", "predictions.parquet")
    oof = (run / "oof.parquet").read_bytes()
    with ExitStack() as files:
        for name in names:  # restores them
            files.enter_context(damaged(fold / name, lambda path: None))
        held_out = read_predictions(fold / "predictions.parquet")
        other = replace(held_out, model_hash=np.full(len(held_out), "0" * 64, object), logits=held_out.logits + 1)
        write_predictions(fold / "predictions.parquet", other)
        crossval(run)
        assert "tri fold 0: 22 held-out lesions predicted again" in capsys.readouterr().out
        assert (run / "oof.parquet").read_bytes() == oof
        weights = read_weights(fold / "weights")
        save_weights(fold / "weights", {name: each + 0.1 for name, each in weights.items()}, epoch=1)
        with pytest.raises(CheckpointError, match=f"^{fold}/weights.safetensors: .*not that of fold.json; delete"):
            predict(run)
        write_info(fold / "fold", **{**read_info(fold / "fold"), "weights": read_info(fold / "weights")["sha256"]})
        with pytest.raises(DataError, match=f"^{run}/oof.parquet: .*other networks than that in {fold}; .*crossval"):
            stack(run)


def test_model_of_an_earlier_version_without_a_checksum(run):
    """Its bytes reach XGBoost only where they are a model: others would end the process."""
    described, model = run / "stack.json", run / "stack.ubj"
    content = json.loads(described.read_text())
    content = {key: value for key, value in content.items() if key not in (KEY, "model_sha256")}
    generator, good, refused = random.Random(0), model.read_bytes(), 0
    with damaged(described, other_json(json.dumps(content))):
        stacker = FittedStacker.load(described)
        rows = np.zeros((2, stacker.width), np.float32)
        for _ in range(60):
            changed = bytearray(good)
            for _ in range(generator.choice((1, 20))):
                changed[generator.randrange(len(changed))] = generator.randrange(256)
            with damaged(model, partial(write_bytes, bytes(changed))):
                try:
                    assert FittedStacker.load(described).predict(rows).shape == (2, len(stacker.diagnoses))
                except DataError as error:
                    assert str(error).startswith(f"{model}: not a model of XGBoost")
                    refused += 1
    assert refused > 30


def write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [empty, cut, garbage, not_utf8, folder])
def test_damaged_tokens_are_named(tmp_path, damage):
    cache = TokenCache(tmp_path, 3, (2, 4))
    cache.write("plain", 0, np.ones((3, 2, 2, 4)))
    path = tmp_path / "plain" / "000000.tokens"
    cache.numbers(np.arange(3), 0, "plain")
    with damaged(path, damage), pytest.raises(DataError, match=f"^{path}: .*delete it, and the next run computes it"):
        TokenCache(tmp_path, 3, (2, 4)).numbers(np.arange(3), 0, "plain")
    for lesions, shape, dtype in ((2, (2, 4), "float16"), (3, (2, 5), "float16"), (3, (2, 4), "bfloat16")):
        with pytest.raises(DataError, match=f"^{path}: holds other tokens"):
            TokenCache(tmp_path, lesions, shape, dtype).numbers(np.arange(2), 0, "plain")


def test_damaged_records_are_named_or_begun_again(tmp_path):
    trial = tmp_path / "trial.json"
    for how, damage in DAMAGES.items():
        Trial(0, {"train.optim.lr": 0.1}).write(tmp_path)
        damage(trial)
        with pytest.raises(DataError, match=f"^{trial}: not the record of a trial.*remove its folder"):
            read_trial(tmp_path)
        if trial.is_dir():
            trial.rmdir()
        micro_batch = MicroBatch(tmp_path, "hash", TrainConfig(micro_batch=8, global_batch=32))
        write_json(micro_batch.path, {"micro_batch": 4, "identity": "hash"})
        assert micro_batch.size() == 4
        damage(micro_batch.path)
        assert micro_batch.size() == 8, how
        if micro_batch.path.is_dir():
            micro_batch.path.rmdir()


@pytest.mark.slow
def test_every_file_of_a_run_in_every_program(run, trained_run, tmp_path, capsys):
    """Each program works on each file, each file is damaged in each way, and each program meets each way, in a copy of
    the run with a predicted test set; the readers of JSON are tried with more ways above.
    """
    if not (run / "shards" / "test").exists():
        pack_shards(read_challenge(trained_run.test.folder), run / "shards" / "test", short_side=None)
    for work in (packed, refit):
        work(run)
    names = [
        str(path.relative_to(run)) for path in sorted(run.rglob("*"))
        if path.is_file() and not {"fold-1", "cnn", "report"} & {*path.parts} and path.suffix not in (".lock", ".tar")
    ]  # fmt: skip
    faults = []
    for file, name in enumerate(names):
        for number, work in enumerate(PROGRAMS):
            damage = (empty, cut, garbage, folder)[(file + number) % 4]
            copy = shutil.copytree(run, tmp_path / "copy" / "run")
            damage(copy / name)
            if found := fault(work, copy, copy / name):
                faults.append((name, damage.__name__, work.__name__, found))
            capsys.readouterr()
            shutil.rmtree(copy.parent)
    assert not faults


def test_zip_of_several_runs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "runs.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("b", "a"):
            archive.writestr(f"{name}/config.yaml", "seed: 1")
    with pytest.raises(DataError, match=rf"^{path}: holds several runs \(a, b\); extract it and give"):
        locate_run(path)


def test_damaged_zip_of_a_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, generator, refused = tmp_path / "run.zip", random.Random(0), 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("run/config.yaml", "# a comment\n" * 50)
        archive.writestr("run/oof.parquet", generator.randbytes(100) * 20)
    good = path.read_bytes()
    for number in range(100):
        changed = bytearray(good)
        for _ in range(generator.choice((1, 3, 30))):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        path.write_bytes(changed[: generator.randrange(len(changed))] if number % 10 == 0 else changed)
        try:
            locate_run(path)
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
    assert refused > 80
