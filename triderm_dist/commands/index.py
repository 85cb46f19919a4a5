"""Index WebDataset shards written by other programs in one scan, so that they can be used like packed ones.

triderm index folder=their_shards
triderm index folder=their_shards task=TASK.yaml
triderm index folder=their_shards slice=3/8
triderm index folder=their_shards clinical='[closeup.jpg, closeup.jpeg]' dermoscopic='[derm.jpg]'

Supported: plain .tar files; consecutive members with one key per lesion, in any order; one JPEG per view; .json with
label (or diagnosis), group (or patient_id), concepts, metadata, named as by triderm pack or in the challenge's tables;
.cls with a diagnosis. Labels by other words, or numbers, need a task whose diagnoses list them as words. What is absent
is missing. The tars are not changed.

A scan that was interrupted resumes at the next tar. On several machines, slice=1/8, slice=2/8 and so on scan a part of
the tars each, and then the same command without slice= writes the index. On a Ray cluster each tar is a task, and those
of a machine that is lost run on others.

triderm index folder=their_shards address=auto

FOLDER may be one behind a URL. Each tar is fetched once, and the index is uploaded; where the URL is not written to,
output= takes a local folder, which trains like the URL of a packed set.

triderm index folder=s3://BUCKET/their_shards
triderm index folder=https://HOST/their_shards output=runs/theirs
"""

from pathlib import Path
from typing import Any

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import Extensible, Groups, Invalid, MissingView, Threads, slice_of
from triderm_dist.schema import ConfigError
from triderm_dist.settings import PathText


class IndexConfig(Extensible):
    folder: PathText = Field(
        description="folder of the tars or its URL; index.json and samples.parquet are written into it"
    )
    output: PathText | None = Field(
        None, description="local folder for the index of tars behind a URL that is not written to; null: the URL"
    )
    task: PathText | None = Field(
        None,
        description="task.yaml, or the name of a shipped task, whose diagnoses list the words of the labels; default "
        "task.yaml in the folder, else milk10k",
    )
    clinical: tuple[str, ...] = Field(
        ("clinical.jpg", "clinical.jpeg", "closeup.jpg", "closeup.jpeg"),
        min_length=1,
        description="extensions of the clinical photo after the key and a dot; the first that exists is used",
    )
    dermoscopic: tuple[str, ...] = Field(
        ("dermoscopic.jpg", "dermoscopic.jpeg", "dermoscopy.jpg", "derm.jpg"),
        min_length=1,
        description="extensions of the dermoscopic photo",
    )
    groups: Groups = "hash"
    salt: PathText | None = Field(
        None, description="groups=hash: the .groups.csv of another set, or that set's folder; see triderm pack"
    )
    missing_view: MissingView = "refuse"
    invalid: Invalid = "refuse"
    workers: Threads = None
    slice: str | None = Field(
        None,
        description="scan one of several slices of the tars only, such as 3/8 for the third of eight, into "
        "FOLDER.index.part; null: scan those that no slice has scanned, and write the index",
    )
    address: str | None = Field(
        None,
        description="a running Ray cluster whose machines scan the tars, and all see the folder: auto for the one that "
        "this machine belongs to, or HOST:PORT; workers is then the cores per tar, null: 1",
    )


def main(config: IndexConfig) -> None:
    from triderm_dist.data.group_hashes import GroupHashing
    from triderm_dist.data.problems import InvalidLesions
    from triderm_dist.data.shards.console import print_index, print_problems, progress_bar
    from triderm_dist.data.shards.foreign_folder import folder_task
    from triderm_dist.data.shards.index_foreign import index_shards, index_slice
    from triderm_dist.data.shards.publish import local_name
    from triderm_dist.distributed.ray_tasks import ray_tasks
    from triderm_dist.tasks import load_task, milk10k_task

    part = slice_of(config.slice)
    hashing = GroupHashing.of(config.groups, config.salt, explicit="groups" in config.model_fields_set)
    table = Path(f"{local_name(config.output or config.folder)}.problems.csv")
    if config.address and part:
        raise ConfigError("address: the cluster scans all tars; leave out slice=")
    task = load_task(config.task) if config.task else folder_task(config.folder)
    if task is None:
        print("note: no task= is set and the folder has no task.yaml: the tars are read as those of MILK10k")
    options: dict[str, Any] = {
        "task": task or milk10k_task(),
        "extensions": {"clinical": config.clinical, "dermoscopic": config.dermoscopic},
        "missing_view": config.missing_view,
        "workers": config.workers,
    }
    try:
        tasks = ray_tasks(config.address, config.workers or 1, "scanning")
        with tasks as distribute, progress_bar("scanning shards") as progress:
            if part:
                problems = index_slice(config.folder, *part, **options, progress=progress)
                print_problems(problems, table.with_name(f"{table.stem}-{part[0]}-of-{part[1]}.csv"))
                print(f"slice {config.slice} is scanned; after the last one: the same command without slice=")
                return
            index = index_shards(
                config.folder,
                **options,
                invalid=config.invalid,
                progress=progress,
                note=lambda text: print(f"note: {text}"),
                hashing=hashing,
                distribute=distribute,
                output=config.output,
            )
    except InvalidLesions as error:
        print_problems(error.problems, table)
        raise
    print_problems(index.problems, table)
    print_index(index, "indexed")


def start() -> None:
    run(IndexConfig, main, __doc__)


if __name__ == "__main__":
    start()
