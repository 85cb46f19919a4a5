"""Pack a folder of photos with a table into WebDataset shards with an index.

triderm pack source=MILK10k output=runs/milk10k/shards/train
triderm pack source=CLINIC output=runs/clinic/shards/train
triderm pack source=HAM10000 output=runs/ham/shards/train task=ham10000

The folder is read as CLINIC/task.yaml says, which `triderm task init CLINIC` writes, or as the MILK10k challenge's.
After an interruption, the same command resumes from the finished shards. Machines with a file system in common share
the work: each packs one slice, then one of them writes the index.

triderm pack source=CLINIC output=runs/clinic/shards/train slice=1/8
triderm pack source=CLINIC output=runs/clinic/shards/train finish=true

On a Ray cluster each shard is a task, and those of a machine that is lost run on others.

triderm pack source=CLINIC output=runs/clinic/shards/train address=auto
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import Extensible, Groups, Invalid, MissingView, Threads, slice_of
from triderm_dist.runtime.redact import redact
from triderm_dist.schema import ConfigError
from triderm_dist.settings import PathText

if TYPE_CHECKING:
    from triderm_dist.data.group_hashes import GroupHashes
    from triderm_dist.data.readers.dataset import Dataset


class PackConfig(Extensible):
    source: PathText = Field(description="folder with photos and a table, or that table where the folder holds several")
    output: PathText = Field(
        description="folder of the shards, which appears when it is complete, or its URL, where index.json comes last"
    )
    short_side: int | None = Field(
        288,
        ge=32,
        description="short side in pixels to which larger photos are reduced; null keeps the bytes of the pixels. "
        "EXIF, GPS, XMP and comments are always removed",
    )
    shard_samples: int = Field(512, ge=1, description="lesions per shard")
    task: PathText | None = Field(
        None,
        description="what the table holds: a task.yaml, the name of a shipped task, or the index.json of a packed set; "
        "default task.yaml in the folder, else milk10k where it has that layout",
    )
    groups: Groups = "hash"
    salt: PathText | None = Field(
        None,
        description="groups=hash: the .groups.csv of another set, or that set's folder, so that patients in common are "
        "found; null takes the salt in OUTPUT.groups.csv, or a random one",
    )
    missing_view: MissingView = "refuse"
    invalid: Invalid = "refuse"
    workers: Threads = None
    slice: str | None = Field(
        None,
        description="pack one of several slices only, such as 3/8 for the third of eight, into OUTPUT.part; null: all",
    )
    finish: bool = Field(False, description="write the index of the shards that all slices have packed")
    address: str | None = Field(
        None,
        description="a running Ray cluster whose machines pack the shards, and all see source and output: auto for the "
        "one that this machine belongs to, or HOST:PORT; workers is then the cores per shard, null: 1",
    )


def main(config: PackConfig) -> None:
    from triderm_dist.data.problems import InvalidLesions
    from triderm_dist.data.shards.console import print_index, print_problems, progress_bar
    from triderm_dist.data.shards.pack import pack_shards, pack_slice
    from triderm_dist.data.shards.publish import local_name
    from triderm_dist.distributed.ray_tasks import ray_tasks

    part, name = slice_of(config.slice), local_name(config.output)
    _check(config)
    try:
        dataset, hashes = _read(config)
        for note in dataset.notes:
            print(f"note: {note}")
        tasks = ray_tasks(config.address, config.workers or 1, "packing")
        with tasks as distribute, progress_bar("packing lesions") as progress:
            options: dict[str, Any] = {
                "short_side": config.short_side,
                "shard_samples": config.shard_samples,
                "invalid": config.invalid,
                "workers": config.workers,
                "progress": progress,
            }
            if part:
                problems = pack_slice(dataset, config.output, *part, **options)
            else:
                index = pack_shards(
                    dataset,
                    config.output,
                    group_hashes=hashes,
                    finish=config.finish,
                    distribute=distribute,
                    release_lesions=True,
                    **options,
                )
    except InvalidLesions as error:
        print_problems(error.problems, Path(f"{name}.problems.csv"))
        raise
    if part:
        print_problems(problems, Path(f"{name}.problems-{part[0]}-of-{part[1]}.csv"))
        print(
            f"slice {config.slice} is packed; after the last one: the same command with finish=true instead of slice="
        )
        return
    print_problems(index.problems, Path(f"{name}.problems.csv"))
    print_index(index)


def _check(config: PackConfig) -> None:
    """Raise ConfigError for settings that cannot be combined, and for a source behind a URL."""
    from triderm_dist.data.shards.open import is_url

    if is_url(config.source):
        raise ConfigError(
            f"source={redact(config.source)}: tables are read from a folder; copy the table into one, and name the "
            "photos in it by their URLs"
        )
    if config.slice and config.finish:
        raise ConfigError("finish: writes the index of all slices; leave out slice=")
    if config.address and (config.slice or config.finish):
        raise ConfigError("address: the cluster packs all shards; leave out slice= and finish=")


def _read(config: PackConfig) -> tuple[Dataset, GroupHashes | None]:
    """Return the data set, and the hashes of its groups where they replace them."""
    from triderm_dist.data.group_hashes import GroupHashing, hash_groups
    from triderm_dist.data.readers.source import find_task, read_source
    from triderm_dist.data.shards.publish import local_name

    hashing = GroupHashing.of(config.groups, config.salt, explicit="groups" in config.model_fields_set)
    task = find_task(config.source, config.task)
    source = os.path.abspath(config.source) if config.address else config.source  # tasks have other working folders
    dataset = read_source(source, task, config.missing_view, config.invalid)
    if hashing is None or (dataset.problems and config.invalid == "refuse"):
        return dataset, None
    return hash_groups(dataset, local_name(config.output), hashing)


def start() -> None:
    run(PackConfig, main, __doc__)


if __name__ == "__main__":
    start()
