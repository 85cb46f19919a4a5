"""Pack shards on a Ray cluster, each in a task of its own; Ray runs the tasks of a machine that is lost on others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triderm_dist.cli import Interrupted
from triderm_dist.data.shards.pack import Distribute, ShardWriter
from triderm_dist.distributed.ray_cluster import RESUME, capacity, running_ray
from triderm_dist.runtime.extras import require
from triderm_dist.schema import ConfigError, Lesion

RETRIES = 5
"""How often a task is run again whose process or machine was lost."""


@contextmanager
def ray_shards(address: str, cpus: int) -> Iterator[Distribute]:
    """Context with a function that has shards packed by the Ray cluster at `address`, each on `cpus` cores.

    Every machine sees the photos and the output under the same names. Raises InputError if Ray does not start,
    ConfigError where no machine has the cores.
    """
    require("address", "ray")
    with running_ray(address, cpus, setting="address"):
        fitting, largest = capacity({"CPU": cpus})
        if not fitting:
            raise ConfigError(f"workers={cpus}: no machine of the cluster has so many cores; the largest has {largest}")
        print(f"packing on a Ray cluster, {fitting} shards at once", flush=True)

        def distribute(writer: ShardWriter, part: Path, shards: Iterable[tuple[int, list[Lesion]]]) -> Iterator[int]:
            return _written(writer, part, shards, cpus, 2 * fitting)

        yield distribute


def _written(
    writer: ShardWriter, part: Path, shards: Iterable[tuple[int, list[Lesion]]], cpus: int, most: int
) -> Iterator[int]:
    """Yield the number of each shard when it is written. most: tasks that are submitted at once."""
    import ray

    remote = ray.remote(num_cpus=cpus, max_retries=RETRIES)(_write)
    shared = ray.put((os.getcwd(), writer, part.absolute()))
    running = dict[Any, int]()

    def ended() -> Iterator[int]:
        references, _ = ray.wait(list(running), timeout=1.0)  # Python handles signals between two waits
        for reference in references:
            number = running.pop(reference)
            try:
                ray.get(reference)
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
                text = f"shard {number}: its process was lost {RETRIES + 1} times, possibly out of memory"
                raise Interrupted(f"{text}; {RESUME.partition(';')[0]}") from error
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            yield number

    for number, lesions in shards:
        while len(running) >= most:
            yield from ended()
        running[remote.options(name=f"shard {number}").remote(shared, number, lesions)] = number
    while running:
        yield from ended()


def _write(shared: tuple[str, ShardWriter, Path], number: int, lesions: list[Lesion]) -> None:
    """Write a shard in a process of Ray. shared: working folder of the program, in which paths may be relative."""
    folder, writer, part = shared
    os.chdir(folder)
    writer.keep_or_write(part, number, lesions)
