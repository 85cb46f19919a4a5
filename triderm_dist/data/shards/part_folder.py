"""The folder OUTPUT.part that holds a set until it is packed completely.

    shards/shard-000000.tar       a finished shard
    rows/000000.parquet           its rows; the schema holds what `FinishedShard` does

Where the output is a folder behind a URL, each finished shard is uploaded and removed from OUTPUT.part, and after it
the record of its rows, as OUTPUT/rows.part/000000.parquet, so that any machine resumes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from triderm_dist.data.problems import Problem
from triderm_dist.data.shards.format import ShardFile
from triderm_dist.data.shards.publish import RemoteFolder
from triderm_dist.data.threads import map_in_order
from triderm_dist.files import PATIENT_DATA, atomic_path, file_sha256

_RECORD = b"triderm-shard"
_REMOTE_ROWS = "rows.part"
"""The folder of rows/ behind a URL, until the index is there."""


@dataclass(frozen=True)
class FinishedShard:
    """A finished shard.

    source: hash of its input.  settings: hash of those that it was packed with.  file: None where all its lesions were
    dropped.  converted: the number of photos by what was converted in them.
    """

    source: str
    settings: str
    file: ShardFile | None
    problems: tuple[Problem, ...]
    converted: Mapping[str, int]


@dataclass(frozen=True)
class PartFolder:
    """The finished shards of a set, by number, in a local folder or behind the URL of the output."""

    path: Path
    url: str | None = None

    def create(self) -> None:
        """Create the folders of the tars and of their rows."""
        for name in ("shards", "rows"):
            (self.path / name).mkdir(parents=True, exist_ok=True)

    def tar(self, number: int) -> Path:
        return self.path / "shards" / f"shard-{number:06d}.tar"

    def rows(self, number: int) -> Path:
        return self.path / "rows" / f"{number:06d}.parquet"

    def add(self, number: int, shard: FinishedShard, rows: pa.Table) -> None:
        """Record a shard whose tar is complete, and upload both where the output is behind a URL."""
        record = {
            "source": shard.source,
            "settings": shard.settings,
            "file": vars(shard.file) if shard.file else None,
            "problems": [asdict(problem) for problem in shard.problems],
            "converted": dict(shard.converted),
        }
        with atomic_path(self.rows(number), PATIENT_DATA) as temporary:
            pq.write_table(rows.replace_schema_metadata({_RECORD: json.dumps(record).encode()}), temporary)
        if self.url:
            remote = RemoteFolder(self.url)
            if shard.file:
                remote.put(self.tar(number), shard.file.url)
                self.tar(number).unlink()
            remote.put(self.rows(number), self._remote_rows(number))

    def read(self, number: int) -> FinishedShard | None:
        """Return what is recorded of a shard, None if it is not finished; behind a URL, also of one that another
        machine has written, whose rows are downloaded.
        """
        if self.url:
            if (content := RemoteFolder(self.url).read(self._remote_rows(number))) is None:
                return None
            with atomic_path(self.rows(number), PATIENT_DATA) as temporary:
                temporary.write_bytes(content)
        try:
            record = json.loads(pq.read_schema(self.rows(number)).metadata[_RECORD])
            file = ShardFile(**record["file"]) if record["file"] else None
            problems = tuple(Problem(**entry) for entry in record["problems"])
            # Shards of versions that did not count conversions lack the key, and are written again.
            return FinishedShard(record["source"], record.get("settings", ""), file, problems, record["converted"])
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            return None

    def is_intact(self, number: int, shard: FinishedShard) -> bool:
        """Return whether the tar of a shard has the recorded checksum; behind a URL, the recorded size."""
        if shard.file is None:
            return True
        if self.url:
            return RemoteFolder(self.url).size(shard.file.url) == shard.file.bytes
        path = self.tar(number)
        return path.is_file() and file_sha256(path) == shard.file.sha256

    def files_except(self, numbers: Iterable[int]) -> set[Path]:
        """Return the local files that are not of the shards `numbers`."""
        own = {path(number) for number in numbers for path in (self.tar, self.rows)}
        return {*(self.path / "shards").iterdir(), *(self.path / "rows").iterdir()} - own

    def remove(self, shards: int, workers: int) -> None:
        """Remove the folder, and behind the URL all of a number of shards."""
        if self.url:
            remote = RemoteFolder(self.url)
            for _ in map_in_order(lambda number: remote.remove(self.tar(number).name), range(shards), workers):
                pass
            remote.remove(_REMOTE_ROWS)
        shutil.rmtree(self.path)

    def complete(self, folder: Path) -> None:
        """Make the shards and their index the output: upload the index, or rename the folder to `folder`."""
        if self.url:
            remote = RemoteFolder(self.url)
            remote.put_index(self.path / "shards")
            remote.remove(_REMOTE_ROWS)
        else:
            (self.path / "shards").rename(folder)
        shutil.rmtree(self.path)

    def _remote_rows(self, number: int) -> str:
        return f"{_REMOTE_ROWS}/{self.rows(number).name}"
