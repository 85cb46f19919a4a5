"""What an index.json may hold: types and bounds of its entries, as an index may come from anybody's bucket."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from triderm_dist.checksums import DamagedFile, without_checksum
from triderm_dist.data.shards.format import EXTENSIONS, SAMPLES, SHARD_NAME_RULE, ShardFile, is_shard_name
from triderm_dist.data.shards.photos import MAX_PIXELS
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import VIEWS, DataError

MAX_BYTES = 1 << 30
"""Size of an index.json; that of 100,000 shards has 16 MB."""

MAX_SELECTED = 2000
"""Characters of the condition by which a set was selected."""

AGAIN = "pack or index the data again"

_PHOTO_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


def _shard_name(name: str) -> str:
    if not is_shard_name(name):
        raise ValueError(f"{name!r:.100} is not a file name of a shard: {SHARD_NAME_RULE}")
    return name


def _name(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{text!r:.100} holds characters that are not printable")
    return text


def _distinct(names: list[str]) -> list[str]:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"names {twice[0]!r} twice")
    return names


def _photo_sizes(sizes: dict[str, int]) -> dict[str, int]:
    if not sizes:
        raise ValueError("is empty")
    for text in sizes:
        if not (match := _PHOTO_SIZE.fullmatch(text)) or int(match[1]) * int(match[2]) > MAX_PIXELS:
            raise ValueError(f"holds the photo size {text!r:.40}, not WIDTHxHEIGHT of at most {MAX_PIXELS} pixels")
    return sizes


Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Positive = Annotated[int, Field(ge=1, lt=1 << 53)]
Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_name)]
Names = Annotated[list[Name], Field(max_length=10_000), AfterValidator(_distinct)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)


class ShardEntry(_Entry):
    url: Annotated[str, AfterValidator(_shard_name)]
    samples: Positive
    bytes: Positive
    sha256: Hash

    @property
    def file(self) -> ShardFile:
        return ShardFile(self.url, self.samples, self.bytes, self.sha256)


class SamplesEntry(_Entry):
    url: Annotated[str, Field(pattern=f"^{re.escape(SAMPLES)}$")]
    rows: Positive
    bytes: Positive
    sha256: Hash

    @property
    def file(self) -> ShardFile:
        return ShardFile(SAMPLES, self.rows, self.bytes, self.sha256)


class ProblemEntry(_Entry):
    lesion_id: str
    kind: str
    where: str
    what: str


class PackedWith(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    short_side: Positive | None = None


class Groups(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    salt: Name


class IndexContent(BaseModel):
    """The entries of an index.json that are read; others, of later versions, are ignored.

    labels: {spelling in the samples' records: diagnosis}, of earlier versions.
    """

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    concepts: Names
    diagnoses: Names
    metadata_fields: Names
    shards: Annotated[list[ShardEntry], Field(min_length=1)]
    samples: SamplesEntry
    counts: dict[str, Count] = Field(default_factory=dict)
    photo_sizes: Annotated[dict[str, Positive], AfterValidator(_photo_sizes)]
    shared_photos: list[Annotated[list[str], Field(min_length=2, max_length=2)]]
    problems: list[ProblemEntry]
    extensions: dict[str, list[str]] = Field(default_factory=lambda: {view: [*EXTENSIONS[view]] for view in VIEWS})
    labels: dict[str, str] = Field(default_factory=dict)
    metadata_categories: dict[str, list[str]] = Field(default_factory=dict)
    converted: dict[Name, Count] = Field(default_factory=dict)
    packed_with: PackedWith = PackedWith()
    groups: Groups | None = None
    selected: Annotated[str, Field(max_length=MAX_SELECTED)] | None = None


def read_index_json(path: Path) -> dict[str, Any]:
    """Return the content of an index.json. Raises DataError if it is not a JSON mapping, or has another checksum."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise DataError(f"{path}: {size} bytes are too many for an index; {AGAIN}")
        raw = json.loads(path.read_bytes(), object_pairs_hook=_without_doubles)
    except OSError as error:
        raise DataError(f"{path}: not readable ({error.strerror}); {AGAIN}") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply for an index; {AGAIN}") from None
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON ({one_line(error)}); {AGAIN}") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path}: not an index of shards; {AGAIN}")
    try:
        return without_checksum(raw)
    except DamagedFile as error:
        raise DataError(f"{path}: {error}; {AGAIN}") from None


def check_content(raw: dict[str, Any], path: Path) -> IndexContent:
    """Return the entries of an index.json, checked. Raises DataError naming the first that is missing or wrong."""
    try:
        content = IndexContent.model_validate(raw)
    except ValidationError as errors:
        first = errors.errors(include_url=False, include_input=False)[0]
        entry = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        if first["type"] == "missing":
            what = f"has no {entry!r}, so it is incomplete"
        elif first["type"] == "extra_forbidden":
            what = f"has an unknown entry {entry!r:.100}"
        else:
            what = f"{entry:.100} {first['msg'].removeprefix('Value error, ').replace('Input should', 'should')}"
        raise DataError(f"{path}: {one_line(what)}; {AGAIN}") from None
    names = Counter(shard.url.lower() for shard in content.shards)  # some file systems ignore case
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise DataError(f"{path}: lists the shard {twice} twice; {AGAIN}")
    return content


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        _distinct([name for name, _ in pairs])
    return entries
