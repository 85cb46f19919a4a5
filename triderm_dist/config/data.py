"""Settings of the data: sources, shards, folds, the loader, and extra sets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from triderm_dist.config.limits import MAX_SECONDS, MAX_SEED
from triderm_dist.schema import ConfigError
from triderm_dist.settings import PathText, Section


class RemoteConfig(Section):
    """Shards behind a URL: data.shards and data.test_shards may be s3://, gs://, hf://, https:// or any fsspec URL."""

    cache: PathText | None = Field(
        None,
        description="folder of the node's shard cache, shared by its ranks; default triderm-dist/shards in "
        "$XDG_CACHE_HOME or ~/.cache",
    )
    cache_gb: float = Field(
        100.0,
        gt=0,
        description="size limit of that folder in GB (1e9 bytes); least recently used shards are evicted first",
    )
    downloads: int = Field(8, ge=1, description="parallel downloads per node")
    total_seconds: float = Field(
        600.0,
        gt=0,
        le=MAX_SECONDS,
        description="seconds for one shard, retries included, before the run ends with an error",
    )
    stall_seconds: float = Field(
        30.0, gt=0, le=MAX_SECONDS, description="seconds without a byte before a download is retried"
    )
    allow_commands: bool = Field(
        False,
        description="allow pipe:COMMAND URLs, in which {} is the file name; the commands run on every node, "
        "without a shell",
    )


class ExtraSetConfig(Section):
    """A packed set whose lesions join training; docs/several-sets.md explains what is matched and how."""

    shards: PathText = Field(description="packed shards of an extra set, a folder or a URL")
    map: dict[str, str | None] = Field(
        description="diagnosis of the training set's task by diagnosis of the extra set's; null leaves lesions out"
    )
    weight: float = Field(1.0, ge=0, description="weight of the loss of an extra lesion; 0 leaves the set out")
    overlap: Literal["refuse", "drop"] = Field(
        "refuse",
        description="lesions of an extra set with a photo of the training or test set: refuse the set, or leave them "
        "out",
    )


MissingView = Annotated[
    Literal["refuse", "mark"],
    Field(description="lesions with one of two photos: refuse the folder, or mark the other view as missing"),
]
Invalid = Annotated[
    Literal["refuse", "drop"],
    Field(
        description="lesions with an invalid row or an unreadable photo: refuse the folder, or drop and count them",
    ),
]
Groups = Annotated[
    Literal["hash", "plain"],
    Field(
        description="ids of groups, such as patients, in packed sets: hashes under a secret salt, which "
        "SHARDS.groups.csv keeps with the ids, or plain text"
    ),
]
Threads = Annotated[int | None, Field(ge=1, description="threads; null takes one per core")]


class DataConfig(Section):
    source: PathText | None = Field(None, description="folder with photos and a table, or that table")
    test: PathText | None = Field(
        None,
        description="folder of the test set, which triderm pipeline packs and predicts; labels are optional",
    )
    task: PathText | None = Field(
        None,
        description="task.yaml, or the name of a shipped task, by which both folders are read; default task.yaml in "
        "data.source, else milk10k where it has that layout",
    )
    shards: PathText | None = Field(
        None, description="packed training shards, a folder or a URL; default OUTPUT/shards/train"
    )
    test_shards: PathText | None = Field(
        None, description="packed test shards, a folder or a URL; default OUTPUT/shards/test"
    )
    test_truth: PathText | None = Field(
        None, description="ground truth of the test set, to score the submission; null where it is unknown"
    )
    folds: int = Field(5, ge=2, description="number of cross-validation folds")
    fold_seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of the fold assignment")
    short_side: int | None = Field(
        288, ge=32, description="short side in pixels to which packing reduces photos; null keeps their size"
    )
    groups: Groups = "hash"
    missing_view: MissingView = "refuse"
    invalid: Invalid = "refuse"
    verify: bool = Field(
        True,
        description="check the checksums of the shards before work starts; those of a URL are checked after "
        "download in any case",
    )
    workers: int = Field(2, ge=1, description="decoder threads per rank")
    prefetch: int = Field(4, ge=1, description="micro-batches to decode ahead")
    remote: RemoteConfig = RemoteConfig()
    extra: tuple[ExtraSetConfig, ...] = Field(
        (), description="other packed sets whose lesions join training, and training only"
    )

    @property
    def extra_sets(self) -> dict[str, ExtraSetConfig]:
        """The extra sets with a weight, by the name of their setting."""
        return {f"data.extra.{number}": each for number, each in enumerate(self.extra) if each.weight}


def slice_of(text: str | None) -> tuple[int, int] | None:
    """Return K and N of the setting slice=K/N, None if it is not given. Raises ConfigError for another text."""
    if text is None:
        return None
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise ConfigError(f"slice={text}: write K/N for the K-th of N slices, such as 1/8")
    return int(number), int(of)
