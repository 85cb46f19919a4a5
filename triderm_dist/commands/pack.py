"""Pack a challenge folder into WebDataset shards with an index.

triderm pack source=MILK10k output=runs/milk10k/shards/train

After an interruption, the same command resumes from the finished shards.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import Extensible
from triderm_dist.settings import PathText


class PackConfig(Extensible):
    source: PathText = Field(description="challenge folder, or its metadata table where the folder holds several")
    output: PathText = Field(description="folder of the shards; it appears when it is complete")
    short_side: int | None = Field(
        288,
        ge=32,
        description="short side in pixels to which larger photos are reduced; null keeps the bytes of the pixels. "
        "EXIF, GPS, XMP and comments are always removed",
    )
    shard_samples: int = Field(512, ge=1, description="lesions per shard")
    missing_view: Literal["refuse", "mark"] = Field(
        "refuse", description="lesions with one photo: refuse them, or mark the other view as missing"
    )
    invalid: Literal["refuse", "drop"] = Field(
        "refuse",
        description="lesions with an invalid row or an unreadable photo: refuse the folder, or drop and count them",
    )
    workers: int | None = Field(None, ge=1, description="threads; null takes one per core")


def main(config: PackConfig) -> None:
    from triderm_dist.data.problems import InvalidLesions
    from triderm_dist.data.readers.milk10k import read_challenge
    from triderm_dist.data.shards.console import print_index, print_problems, progress_bar
    from triderm_dist.data.shards.pack import pack_shards

    try:
        dataset = read_challenge(config.source, config.missing_view, config.invalid)
        for note in dataset.notes:
            print(f"note: {note}")
        with progress_bar("packing lesions") as progress:
            index = pack_shards(
                dataset,
                config.output,
                short_side=config.short_side,
                shard_samples=config.shard_samples,
                invalid=config.invalid,
                workers=config.workers,
                progress=progress,
            )
    except InvalidLesions as error:
        print_problems(error.problems, Path(f"{config.output}.problems.csv"))
        raise
    print_problems(index.problems, Path(f"{config.output}.problems.csv"))
    print_index(index)


def start() -> None:
    run(PackConfig, main, __doc__)


if __name__ == "__main__":
    start()
