"""Verify a folder of shards: checksums, index, every photo, and that plain `webdataset` reads the same samples.

triderm verify folder=runs/milk10k/shards/train
triderm verify folder=s3://BUCKET/milk10k/train
"""

from pathlib import Path

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import MAX_SEED, Extensible, RemoteConfig, Threads
from triderm_dist.schema import DataError
from triderm_dist.settings import PathText


class VerifyConfig(Extensible):
    folder: PathText = Field(description="folder of shards, or its URL, of which every shard is fetched")
    folds: int = Field(5, ge=2, description="number of folds that must be possible")
    fold_seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of the fold assignment")
    workers: Threads = None


def main(config: VerifyConfig) -> None:
    from triderm_dist.data.shards.console import print_index, print_problems, progress_bar
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.data.shards.publish import local_name
    from triderm_dist.data.shards.verify import verify

    index = open_index(config.folder, RemoteConfig())
    with progress_bar("checking lesions") as progress:
        problems = verify(index, config.folds, config.fold_seed, config.workers, progress)
    if problems:
        print_problems(problems, Path(f"{local_name(config.folder)}.problems.csv"))
        raise DataError(f"{problems[0]} (problem 1 of {len(problems)})")
    print_index(index, "verified")
    folds = f"{config.folds} folds are possible" if (index.labels >= 0).any() else "no labels, so no folds"
    photos = int((index.sizes > 0).sum())
    missing = len(index.task.views) * len(index) - photos
    print(
        f"valid: checksums, counts, {photos} photos ({missing} views missing), samples as read by webdataset, {folds}"
    )


def start() -> None:
    run(VerifyConfig, main, __doc__)


if __name__ == "__main__":
    start()
