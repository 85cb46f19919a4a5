"""Pack a challenge folder into WebDataset shards with an index.

python -m shards.pack source=MILK10k output=runs/milk10k/shards/train
"""

from typing import Literal

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import Section


class PackConfig(Section):
    source: str = Field(description="challenge folder, or its metadata table where the folder holds several")
    output: str = Field(description="folder of the shards; it appears when it is complete")
    short_side: int | None = Field(
        288, ge=32, description="photos are reduced to this short side in pixels; null keeps them"
    )
    shard_samples: int = Field(512, ge=1, description="lesions a shard")
    missing_view: Literal["refuse", "mark"] = Field(
        "refuse", description="a lesion with one photo: refuse it, or keep it with the view marked missing"
    )
    invalid: Literal["refuse", "drop"] = Field(
        "refuse", description="an unreadable photo: refuse the folder, or drop the lesion and count it"
    )
    workers: int = Field(2, ge=1, description="decoder threads")


def main(config: PackConfig) -> None:
    from rich.progress import Progress

    from triderm_dist.data.milk10k import read_challenge
    from triderm_dist.data.shards import pack_shards

    dataset = read_challenge(config.source, config.missing_view)
    for note in dataset.notes:
        print(f"note: {note}")
    with Progress(transient=True) as bar:
        task = bar.add_task("packing lesions", total=len(dataset.lesions))
        index = pack_shards(
            dataset,
            config.output,
            short_side=config.short_side,
            shard_samples=config.shard_samples,
            invalid=config.invalid,
            workers=config.workers,
            progress=lambda done, total: bar.update(task, completed=done),
        )
    for problem in index.problems:
        print(f"dropped: {problem}")
    for diagnosis, count in index.counts().items():
        if count:
            print(f"  {diagnosis:<10} {count:>7}")
    size = sum(shard.bytes for shard in index.shards)
    print(f"{len(index)} lesions, {len(index.shards)} shards, {size / 1e6:.1f} MB in {index.folder}")


if __name__ == "__main__":
    run(PackConfig, main, __doc__)
