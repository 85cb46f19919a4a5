"""A small trained run; the fixture `trained_run` shares it between tests, and those that write to it copy it."""

from dataclasses import dataclass
from pathlib import Path

from tests.conftest import Challenge, write_challenge
from triderm_dist.config import load
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.pack import pack_shards


@dataclass(frozen=True)
class TrainedRun:
    """folder: of the run, with the shards of its training set.  test: photos that it was not trained on."""

    folder: Path
    test: Challenge


def train_run(folder: Path) -> TrainedRun:
    """Train two networks in two folds, a stacker and an ensemble, and write photos to predict."""
    from triderm_dist.commands.crossval import CrossvalRun
    from triderm_dist.commands.crossval import main as crossval
    from triderm_dist.commands.stack import StackRun
    from triderm_dist.commands.stack import main as stack

    tower = "{source: 'timm:test_efficientnet', pretrained: false, image_size: 32}"
    words = [
        f"output={folder / 'run'}",
        f"models.tri={{kind: trimodal, width: 16, heads: 2, depth: 1, tower: {tower}}}",
        f"models.cnn={{kind: dual_cnn, width: 16, tower: {tower}}}",
        "data.folds=2",
        "train={epochs: 1, global_batch: 11, micro_batch: 11, trackers: []}",
        "stack={max_rounds: 5, max_depth: 1}",
        "ensemble={use: ensemble, bootstrap: 20, rounds: 3}",
        "predict.batch=4",
    ]
    dataset = read_challenge(write_challenge(folder / "train", lesions=44).folder)
    pack_shards(dataset, folder / "run" / "shards" / "train", short_side=None)
    crossval(load(CrossvalRun, None, words))
    stack(load(StackRun, None, words))
    return TrainedRun(folder / "run", write_challenge(folder / "test", 10, "MILK10k_Test", labeled=False))
