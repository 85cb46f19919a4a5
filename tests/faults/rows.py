"""The programs of the fault matrix, each on files that the programs before it made: 44 lesions, two small networks."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import write_challenge
from tests.processes import ROOT

SETTINGS = """\
data: {shards: PLACE/train, test_shards: PLACE/test, folds: 2, remote: {cache: PLACE/cache}}
train: {epochs: 2, global_batch: 12, micro_batch: 6, log_every: 1, save_every: 1, trackers: [],
  sampling: {kind: shuffle}, augment: {token_variants: 1}}
models:
  tri: {kind: trimodal, width: 16, heads: 2, tower: {TOWER, frozen: true}}
  cnn: {kind: dual_cnn, width: 16, tower: {TOWER}}
stack: {max_rounds: 5, max_depth: 1}
ensemble: {bootstrap: 20, rounds: 3}
predict: {batch: 4, transforms: 2}
output: PLACE/run
""".replace("TOWER", "source: 'timm:test_efficientnet', pretrained: false, image_size: 32")
SPACE = "train.optim.lr: {loguniform: [1.0e-3, 1.0e-2]}\n"


@dataclass(frozen=True)
class Row:
    """A program with its arguments, in which PLACE is the folder of all files, and SERVER the address of its shards.

    after: the row whose result it starts from.  setup: names the function that then prepares the folder.
    again: words that are added when the command is run again.  writes: the folders that are made read-only.
    reads: patterns of the input files to damage.  remote: words by which it takes its shards from SERVER.  targets:
    the processes that signals are sent to, see `Plan.target`.  ranks: runs under a launcher on several ranks too.
    rank_words: words by which it starts two ranks itself.  lost: the names of its ranks, see `Plan.target`.
    """

    name: str
    program: str
    words: tuple[str, ...]
    after: str = ""
    setup: str = ""
    again: tuple[str, ...] = ()
    writes: tuple[str, ...] = ("run",)
    reads: tuple[str, ...] = ()
    ranks: bool = False
    rank_words: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    remote: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("self",)
    environment: dict[str, str] = field(default_factory=dict)


CONFIG = ("--config", "PLACE/settings.yaml")
RUN = ("run=PLACE/run",)
TRAIN_SERVER = ("data.shards=SERVER/train",)
TEST_SERVER = ("data.test_shards=SERVER/test",)
SHARDS = ("train/*.tar", "train/index.json", "train/samples.parquet")
FOLDS = ("run/*/fold-0/fold.json", "run/*/fold-0/weights.*", "run/towers/*/*")
PACK_TEST = ("source=PLACE/photos-test", "output=PLACE/test", "short_side=null")

ROWS = (
    Row(
        "pack", "pack", ("source=PLACE/photos", "output=PLACE/train", "short_side=null", "shard_samples=11"),
        setup="write_sources", writes=(".",), reads=("photos/*.csv", "photos/*/IL_1000/*.jpg"),
    ),
    Row("pack test", "pack", PACK_TEST, after="pack", writes=(".",)),
    Row(
        "index", "index", ("folder=PLACE/foreign",), after="pack test", setup="copy_tars", writes=("foreign",),
        reads=("foreign/*.tar",),
    ),
    Row(
        "crossval", "crossval", CONFIG, after="pack test", writes=("run",), ranks=True, remote=TRAIN_SERVER,
        reads=SHARDS, setup="make_run",
    ),
    Row(
        "embed", "embed", (*RUN, "model=tri"), after="crossval", ranks=True, remote=(*TRAIN_SERVER, *TEST_SERVER),
        reads=(*SHARDS, "test/*", "run/config.yaml", "run/towers/*/*", "run/tokens/*/*/*"),
    ),
    Row("stack", "stack", RUN, after="crossval", reads=(
        "run/config.yaml", "run/oof.parquet", "run/tri/fold-0/predictions.parquet",
    )),
    Row(
        "predict", "predict", RUN, after="stack", ranks=True, remote=TEST_SERVER,
        reads=("test/*", "run/config.yaml", "run/ensemble.json", "run/stack.*", *FOLDS),
    ),
    Row("report", "report", RUN, after="predict", reads=(
        "run/config.yaml", "run/ensemble.json", "run/ensemble_oof.parquet", "run/oof.parquet", "run/stack.*",
        "run/submission.csv", "run/probabilities.*", "run/predictions.parquet", "run/heldout.json",
        "run/*/fold-0/*.json*", "run/*/fold-0/*.parquet", "run/environment.json",
    )),
    Row("refit", "refit", RUN, after="report", ranks=True, remote=TRAIN_SERVER, reads=(
        *SHARDS, "run/config.yaml", "run/tokens/*/*/*", "run/towers/*/*", "run/*/fold-0/fold.json",
    )),
    Row(
        "predict input", "predict", (*RUN, "input=PLACE/photos-test", "output=PLACE/out"), after="report", ranks=True,
        writes=(".",), reads=(
            "photos-test/*.csv", "photos-test/*/IL_1000/*.jpg", "run/config.yaml", "run/ensemble.json", "run/stack.*",
            *FOLDS,
        ),
    ),
    Row("export zip", "export", (*RUN, "output=PLACE/run.zip"), after="report", writes=(".",), reads=(
        "run/config.yaml", "run/ensemble.json", "run/stack.*", *FOLDS,
    )),
    Row("export onnx", "export", (*RUN, "output=PLACE/onnx", "format=onnx", "models=cnn", "folds=0"), after="report",
        writes=(".",), reads=("run/config.yaml", "run/ensemble.json", *FOLDS)),
    Row(
        "search", "search", (*CONFIG, "space=PLACE/space.yaml", "trials=2", "concurrent=1", "seeds=0", "model=tri"),
        after="pack test", setup="make_run", again=("search.resume=true",), reads=("space.yaml", *SHARDS),
        remote=TRAIN_SERVER, targets=("self", "search"), rank_words=("search.workers=2",), lost=("default_worker",),
    ),
    Row(
        "pipeline", "pipeline", (
            *CONFIG, "data.shards=null", "data.test_shards=null", "data.source=PLACE/photos",
            "data.test=PLACE/photos-test",
        ), after="pack test", reads=("photos/*.csv", "photos-test/*.csv"), targets=("self", "pipeline"),
        remote=("data.source=null", "data.test=null", *TRAIN_SERVER, *TEST_SERVER),
        rank_words=("launcher=PLACE/ddp.yaml",), lost=("crossval 1", "predict 1"),
    ),
)  # fmt: skip


def row_of(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def write_sources(place: Path) -> None:
    """Write photos, tables and settings."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    write_challenge(place / "photos", lesions=44)
    write_challenge(place / "photos-test", 11, "MILK10k_Test", labeled=False)
    (place / "settings.yaml").write_text(SETTINGS.replace("PLACE", str(place)))
    (place / "space.yaml").write_text(SPACE)
    ddp = (ROOT / "accelerate_configs" / "ddp.yaml").read_text()
    (place / "ddp.yaml").write_text(ddp.replace("num_processes: 8", "num_processes: 2"))


def copy_tars(place: Path) -> None:
    """Make a folder of tars that another program could have written."""
    (place / "foreign").mkdir()
    for path in (place / "train").glob("*.tar"):
        shutil.copy(path, place / "foreign")


def make_run(place: Path) -> None:
    """Make the folder of the run, so that it can be read-only."""
    (place / "run").mkdir()


def command(row: Row, place: Path, ranks: int = 1, server: str = "", again: bool = False) -> list[str]:
    """Return the module and arguments of a row's program."""
    more = (row.remote if server else (), row.rank_words if ranks > 1 else (), row.again if again else ())
    words = [word for part in (row.words, *more) for word in part]
    module = f"triderm_dist.commands.{row.program}"
    return [module, *(word.replace("PLACE", os.fspath(place)).replace("SERVER", server) for word in words)]
