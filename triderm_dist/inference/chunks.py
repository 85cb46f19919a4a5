"""Predict many lesions in chunks that are stored, so that the work can be interrupted and shared by many ranks.

A rank predicts every WORLD_SIZE-th chunk independently, so that the result does not depend on the number of ranks.
Until all are done, they are in OUTPUT.part/000000.parquet, ...; on resume a chunk is used again if it was predicted
from the same lesions by the same networks, and is undamaged.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from triderm_dist.checksums import DamagedFile, read_checked_parquet, write_checked_parquet
from triderm_dist.data.photo_set import PhotoSet
from triderm_dist.data.problems import Problem
from triderm_dist.ensemble.run_files import ENSEMBLE_FILE, STACK_FILE
from triderm_dist.files import file_sha256
from triderm_dist.inference.predictor import Predictor
from triderm_dist.inference.run_folder import RunFolder

BATCHES = 16
"""Largest number of batches per chunk; fewer lesions are divided into `CHUNKS` chunks of at least a batch each."""
CHUNKS = 64
POLL_SECONDS = 0.2
_KEY = b"triderm-chunk"


@dataclass(frozen=True)
class PredictionJob:
    """Lesions to predict.  drop: leave out lesions with an unreadable photo.  part: the folder of the chunks."""

    predictor: Predictor
    lesions: PhotoSet
    transforms: int
    drop: bool
    part: Path

    def run(
        self, rank: int = 0, world_size: int = 1, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Predict this rank's chunks; rank 0 then waits for those of the other ranks. progress: of rank 0, called with
        (lesions predicted by all ranks, all lesions).

        Raises DataError for an unreadable photo, unless `drop`.
        """
        self.part.mkdir(parents=True, exist_ok=True)
        finished: set[int] = set()

        def report() -> None:
            if rank == 0:
                finished.update(number for number in range(len(self.chunks)) if self._path(number).exists())
                progress(sum(len(self._rows(number)) for number in finished), len(self.lesions))

        for number in range(rank, len(self.chunks), world_size):
            if self.read(number) is None:
                self._path(number).unlink(missing_ok=True)
                self._predict(number)
            report()
        if rank == 0:
            for number in range(len(self.chunks)):
                while number % world_size and self.read(number) is None:
                    time.sleep(POLL_SECONDS)
                    report()
            report()

    @cached_property
    def chunks(self) -> list[slice]:
        """The rows of each chunk: a function of the number of lesions and of the batch."""
        number, batch = len(self.lesions), self.predictor.batch
        size = batch * min(BATCHES, max(1, number // (CHUNKS * batch)))
        return [slice(start, start + size) for start in range(0, number, size)]

    @cached_property
    def key(self) -> str:
        """SHA-256 of everything that determines the result."""
        return hashlib.sha256("".join(self._key(number) for number in range(len(self.chunks))).encode()).hexdigest()

    def result(self) -> tuple[pa.Table, list[Problem], Counter[str]]:
        """Return the table of all lesions, as `Predictor.table` has it, the problems of those left out, and the number
        of photos by what was converted in them.
        """
        tables, problems, changes = [], list[Problem](), Counter[str]()
        for number in range(len(self.chunks)):
            chunk = self.read(number)
            if chunk is None:
                raise FileNotFoundError(2, "was removed or changed by another program", str(self._path(number)))
            tables.append(chunk[0])
            problems += chunk[1]
            changes += chunk[2]
        return pa.concat_tables(tables), problems, changes

    def read(self, number: int) -> tuple[pa.Table, list[Problem], Counter[str]] | None:
        """Return a finished chunk, None if it is absent, damaged or of another job."""
        try:
            table = read_checked_parquet(self._path(number))
            about = json.loads(table.schema.metadata[_KEY])
            if about["key"] != self._key(number):
                return None
            problems = [Problem(**each) for each in about["problems"]]
            return table.replace_schema_metadata(None), problems, Counter(about.get("changes", {}))
        except (DamagedFile, FileNotFoundError, KeyError, TypeError, ValueError, RecursionError):
            return None

    def _predict(self, number: int) -> None:
        lesions = self.lesions.take(self.chunks[number])
        predictions = self.predictor.predict(lesions, self.transforms, self.drop)
        about = {
            "key": self._key(number),
            "problems": [asdict(problem) for problem in predictions.problems.values()],
            "changes": dict(predictions.changes),
        }
        table = self.predictor.table(predictions)
        write_checked_parquet(self._path(number), table, {_KEY: json.dumps(about).encode()})

    def _path(self, number: int) -> Path:
        return self.part / f"{number:06d}.parquet"

    def _rows(self, number: int) -> range:
        return range(len(self.lesions))[self.chunks[number]]

    def _key(self, number: int) -> str:
        if number not in self._keys:
            lesions = self.lesions.take(self.chunks[number])
            self._keys[number] = hashlib.sha256(f"{self._settings} {lesions.fingerprint}".encode()).hexdigest()
        return self._keys[number]

    @cached_property
    def _keys(self) -> dict[int, str]:
        return {}

    @cached_property
    def _settings(self) -> str:
        predictor = self.predictor
        precisions = [str(model.dtype) for model in predictor.models]
        about = [run_hash(predictor.run), self.transforms, self.drop, predictor.batch, predictor.device.type]
        return json.dumps([*about, precisions])


def run_hash(run: RunFolder) -> str:
    """Return the SHA-256 of a run's networks, stacker and ensemble."""
    weights = [[name, [each.weights for each in trained]] for name, trained in run.networks.items()]
    files = [ENSEMBLE_FILE, *sorted(path.name for path in run.path.glob(f"{Path(STACK_FILE).stem}.*"))]
    about = [weights, [[name, file_sha256(run.path / name)] for name in files]]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()
