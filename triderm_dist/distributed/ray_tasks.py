"""Work on the shards of a set on a Ray cluster, each in a task; Ray runs the tasks of a lost machine on others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from triderm_dist.cli import Interrupted
from triderm_dist.data.threads import Distribute, Key, Piece
from triderm_dist.distributed.ray_cluster import RESUME, cluster_capacity, running_ray
from triderm_dist.runtime.extras import require
from triderm_dist.schema import ConfigError

RETRIES = 5
"""How often a task is run again whose process or machine was lost."""


@contextmanager
def ray_tasks(address: str | None, cpus: int, doing: str) -> Iterator[Distribute | None]:
    """Context with a function that has shards worked on by the Ray cluster at `address`, each on `cpus` cores; None
    without an address.

    doing: the kind of work, such as "packing", for the line with the number of concurrent tasks. Paths in the work are
    absolute: the processes have other working folders. Raises InputError if Ray does not start, ConfigError if no
    machine has the cores.
    """
    if address is None:
        yield None
        return
    require("address", "ray")
    with running_ray(address, cpus, setting="address"):
        fitting, largest = cluster_capacity({"CPU": cpus})
        if not fitting:
            raise ConfigError(f"workers={cpus}: no machine of the cluster has so many cores; the largest has {largest}")
        print(f"{doing} on a Ray cluster, {fitting} shards at once", flush=True)

        def distribute(work: Callable[[Key, Piece], object], pieces: Iterable[tuple[Key, Piece]]) -> Iterator[Key]:
            return _done(work, pieces, cpus, 2 * fitting)

        yield distribute


def _done(
    work: Callable[[Key, Piece], object], pieces: Iterable[tuple[Key, Piece]], cpus: int, most: int
) -> Iterator[Key]:
    """Yield the key of each piece when the work on it is done. most: tasks that are submitted at once."""
    import ray

    remote = ray.remote(num_cpus=cpus, max_retries=RETRIES)(_work)
    shared = ray.put(work)
    running = dict[Any, Key]()

    def ended() -> Iterator[Key]:
        references, _ = ray.wait(list(running), timeout=1.0)  # Python handles signals between two waits
        for reference in references:
            key = running.pop(reference)
            try:
                ray.get(reference)
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
                text = f"{_name(key)}: its process was lost {RETRIES + 1} times, possibly out of memory"
                raise Interrupted(f"{text}; {RESUME.partition(';')[0]}") from error
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            yield key

    for key, piece in pieces:
        while len(running) >= most:
            yield from ended()
        running[remote.options(name=_name(key)).remote(shared, key, piece)] = key
    while running:
        yield from ended()


def _name(key: int | str) -> str:
    return f"shard {key}" if isinstance(key, int) else key


def _work(work: Callable[[Any, Any], object], key: Any, piece: Any) -> None:
    """Do the work on a shard in a process of Ray."""
    work(key, piece)
