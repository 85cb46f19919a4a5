"""Trainings one after the other on however many ranks were started, each from where its folder is; rank R writes how
they ended to relay-R.json.

A job is {"settings": [...], "folds": [0] if not told, "stop": rank or null}: that rank asks itself to stop
after the first epoch that ends here.
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

from triderm_dist.cli import Interrupted
from triderm_dist.config import Experiment, load
from triderm_dist.data.shards.index import read_index
from triderm_dist.engine.crossval import run_folds
from triderm_dist.schema import InputError


def stop_here(asked: bool, epoch: int, scores: dict[str, float]) -> None:
    if asked:
        os.kill(os.getpid(), signal.SIGTERM)


def main(output: str, jobs: str) -> None:
    rank, ends = int(os.environ.get("RANK", "0")), []
    for job in json.loads(jobs):
        experiment = load(Experiment, job.get("config"), job["settings"])
        ask = partial(stop_here, job.get("stop") == rank)
        try:
            run_folds(
                experiment, read_index(experiment.train_shards), list(experiment.models), job.get("folds", [0]), ask
            )
            ends.append("done")
        except (Interrupted, InputError, OSError) as error:
            ends.append(f"{type(error).__name__}: {error}")
        Path(output, f"relay-{rank}.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(*sys.argv[1:])
