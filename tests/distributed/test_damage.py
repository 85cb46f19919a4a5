"""One bit flipped anywhere in a file of a run is noticed where the file is read, or changes nothing."""

import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.synthetic_run import write_run
from triderm_dist.checksums import read_checked_json, write_checked_json
from triderm_dist.cli import Interrupted
from triderm_dist.config import Experiment, load
from triderm_dist.data.shards.index import read_index
from triderm_dist.data.token_cache import HEADER, TokenCache
from triderm_dist.engine.checkpoint import Checkpoints
from triderm_dist.engine.crossval import run_folds
from triderm_dist.engine.network_files import load_weights, read_info
from triderm_dist.ensemble.artifact import read_artifact
from triderm_dist.ensemble.fit import fit_ensemble
from triderm_dist.ensemble.fitted_stacker import FittedStacker
from triderm_dist.ensemble.run_files import read_nested
from triderm_dist.ensemble.stack_inputs import EmbeddingTower, read_embeddings, write_embeddings
from triderm_dist.predictions import read_oof, read_predictions
from triderm_dist.schema import CheckpointError, DataError

from .conftest import TINY_TRIMODAL

SETTINGS = (
    """
data: {folds: 2}
train: {epochs: 3, global_batch: 16, micro_batch: 16, ema_decay: 0.9, trackers: [], augment: {token_variants: 1}}
stack: {max_rounds: 5}
ensemble: {bootstrap: 20, rounds: 2}
"""
    + TINY_TRIMODAL
)
FLIPS = 200
NOT_READ = {
    "log.txt",
    "metrics.jsonl",
    "optimizer.txt",
    "config.yaml",
    "README.md",
    "environment.json",
    ".environment.lock",
    ".lock",
    ".fold-0.lock",
}
"""Files for people, and of locks: no result is computed from them."""


@pytest.fixture(scope="module")
def finished(packed, tmp_path_factory) -> Path:
    """A trained fold, predictions of a run, what was fitted on them, and tokens."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(SETTINGS)
    run = folder / "run"
    settings = [f"data.shards={packed}", f"output={folder / 'one'}", f"tokens={folder / 'tokens'}"]
    experiment = load(Experiment, folder / "tiny.yaml", settings)
    run_folds(experiment, read_index(packed), ["tri"], [0])
    write_run(run)
    shutil.copytree(folder / "one" / "tri" / "fold-0", run / "tri" / "fold-0")
    shutil.copytree(folder / "tokens", run / "tokens")
    fit_ensemble(run, load(Experiment, folder / "tiny.yaml", [f"output={run}", "stack.extra=[]"]))
    write_embeddings(run / "embeddings.train.parquet", ["a", "b"], np.ones((2, 3)), EmbeddingTower("timm:a", "0a"))
    return run


@pytest.fixture(scope="module")
def unfinished(packed, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unfinished")
    (folder / "tiny.yaml").write_text(SETTINGS)
    settings = [f"data.shards={packed}", f"output={folder / 'run'}", f"tokens={folder / 'tokens'}"]
    experiment = load(Experiment, folder / "tiny.yaml", settings)
    with pytest.raises(Interrupted):
        run_folds(experiment, read_index(packed), ["tri"], [0], lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    return folder / "run" / "tri" / "fold-0"


class Loaded(torch.nn.Module):
    """Takes the place of a network: keeps the tensors that are loaded."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        from safetensors.torch import load_file

        for name, tensor in load_file(file).items():
            self.register_buffer(name.replace(".", "/"), tensor)

    def state_dict(self) -> dict:  # type: ignore[override]
        return {name.replace("/", "."): tensor for name, tensor in super().state_dict().items()}

    def load_state_dict(self, state: dict) -> None:  # type: ignore[override]
        self.loaded = {name: tensor.tolist() for name, tensor in state.items()}


def reader_of(path: Path) -> Callable[[], object]:
    """Return a function that reads the file as the toolkit does, and returns all that it takes from it."""
    if path.suffix == ".tokens":
        about = json.loads(path.read_bytes()[:HEADER])

        def tokens() -> object:
            cache = TokenCache(path.parents[1], about["lesions"], tuple(about["shape"]), about["dtype"])
            return cache.numbers_of_all_views(np.arange(about["lesions"]), path.parent.name).tolist()

        return tokens
    if path.name == "weights.safetensors":
        network = Loaded(path)
        return lambda: (load_weights(path.with_suffix(""), network), network.loaded)
    if path.name in ("weights.json", "fold.json", "test.json"):
        return lambda: read_info(path.with_suffix(""))
    if path.name in ("predictions.parquet", "test.parquet") or path.name.startswith("without_"):
        return lambda: vars(read_predictions(path))
    if path.name == "oof.parquet":
        return lambda: vars(read_oof(path, features=True))
    if path.name == "ensemble_oof.parquet":
        return lambda: vars(read_nested(path))
    if path.name.startswith("embeddings"):
        return lambda: read_embeddings(path, np.array(["a", "b"], object))
    if path.name == "ensemble.json":
        return lambda: read_artifact(path)
    if path.name in ("stack.json", "stack.ubj"):
        rows = np.random.default_rng(0).normal(size=(4, FittedStacker.load(path.with_name("stack.json")).width))
        return lambda: FittedStacker.load(path.with_name("stack.json")).predict(rows.astype(np.float32))
    raise AssertionError(f"{path}: no reader; add one, or list the file in NOT_READ")


def flip(path: Path, generator: random.Random) -> bytes:
    """Flip one bit of a file; return its content before."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(changed)
    return content


def same(first: object, second: object) -> bool:
    with np.printoptions(threshold=10**9):
        return repr(first) == repr(second)


def test_flipped_bits_of_a_finished_run(finished):
    paths = [
        path for path in sorted(finished.rglob("*")) if path.is_file() and "checkpoints" not in path.parts
        and path.name not in NOT_READ
    ]  # fmt: skip
    paths = [path for path in paths if path.suffix not in (".csv", ".html", ".png", ".svg") and path.stat().st_size]
    generator, outcomes = random.Random(0), Counter()
    expected = {path: reader_of(path)() for path in paths}
    for number in range(FLIPS):
        path = paths[number % len(paths)]
        read = reader_of(path)
        content = flip(path, generator)
        try:
            got = read()
            assert same(got, expected[path]), f"{path}: a flipped bit changed what is read"
            outcomes["harmless"] += 1
        except (CheckpointError, DataError) as error:
            assert str(path) in str(error) or path.name == "stack.json", error
            assert "\n" not in str(error)
            outcomes["noticed"] += 1
        finally:
            path.write_bytes(content)
    assert outcomes["noticed"] >= 0.75 * FLIPS, outcomes  # the others are in names and statistics of parquet footers


def test_flipped_bits_of_an_unfinished_run(unfinished, capsys):
    checkpoints = Checkpoints(unfinished, [""], 2)
    older, newest = sorted((unfinished / "checkpoints").iterdir())
    checkpoints.resume_hashes = [read_checked_json(newest / "state.json")["identity"]]
    # Where the weights of the best epoch so far are damaged, the trainer selects another epoch.
    files = sorted(path for path in (unfinished / "checkpoints").rglob("*") if path.is_file())
    generator, outcomes = random.Random(1), Counter()
    record = read_checked_json(newest / "state.json")
    capsys.readouterr()
    for number in range(FLIPS):
        path = files[number % len(files)]
        content = flip(path, generator)
        found = checkpoints.newest(unfinished)
        output = capsys.readouterr().out
        assert found is not None
        if path.parent == older:
            assert found.folder == newest
        elif found.folder == newest:  # white space of state.json
            assert path.name == "state.json" and found.record == record
            outcomes["harmless"] += 1
        else:
            assert found.folder == older and str(newest) in output and output.endswith("; skipping it\n")
            assert output.count("\n") == 1
            outcomes["noticed"] += 1
        path.write_bytes(content)
    assert outcomes["noticed"] >= 0.9 * sum(outcomes.values()) > 50, outcomes


def test_json_without_checksum_is_read(tmp_path):
    write_checked_json(tmp_path / "a.json", {"a": (1, 2.5), "b": {"c": None}})
    assert read_checked_json(tmp_path / "a.json") == {"a": [1, 2.5], "b": {"c": None}}
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_checked_json(tmp_path / "a.json") == {"a": 1}
