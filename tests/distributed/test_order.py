"""Ranks read exactly the epoch plan: for any world size, after random kills, from a folder or a server."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.data.shards.faulty_server import forbidden, serve, short_body, unavailable
from tests.processes import WORKERS, launch
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.index import read_index
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.predictions import read_predictions

from .test_train import SETTINGS
from .workers.order_worker import GLOBAL_BATCH, plans

WORKER = str(WORKERS / "order_worker.py")


@pytest.fixture(scope="module")
def shards(packed, tmp_path_factory) -> Path:
    """The lesions of `packed` in 9 shards."""
    dataset = read_challenge(packed.parent / "demo" / "train")
    return pack_shards(dataset, tmp_path_factory.mktemp("order") / "shards", short_side=None, shard_samples=12).folder


def planned(index) -> list[list[str]]:
    """Return the lesion IDs of each global batch, over all epochs."""
    names = index.lesion_ids
    return [
        [names[int(row)] for row in plan.order[start : start + GLOBAL_BATCH]]
        for plan in plans(index)
        for start in range(0, len(plan), GLOBAL_BATCH)
    ]


def read_logs(folder) -> dict[tuple[int, int], dict[int, dict[int, list[str]]]]:
    """Return {(attempt, world size): {step: {rank: lesions}}}; ignores incomplete lines, which SIGKILL leaves."""
    result: dict = {}
    for path in folder.glob("*-*-*.txt"):
        attempt, world, rank = map(int, path.stem.split("-"))
        steps = result.setdefault((attempt, world), {})
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                step, *lesions = line.split()
                steps.setdefault(int(step), {})[rank] = lesions
    return result


@pytest.mark.parametrize(("world", "remote"), [(2, False), (4, True)], ids=["2-folder", "4-server"])
def test_ranks_read_exactly_the_plan_of_an_epoch(shards, tmp_path, world, remote):
    index = read_index(shards)
    with serve(shards) as server:
        launch(WORKER, server.url if remote else str(shards), str(tmp_path), json.dumps([[world], 0]))
    # The ranks of a node share the cache: each shard is fetched once.
    assert not remote or {server.requests[shard.url] for shard in index.shards} == {1}
    steps = read_logs(tmp_path)[0, world]
    expected = planned(index)
    assert sorted(steps) == list(range(len(expected)))
    for step, batch in enumerate(expected):
        assert [name for rank in range(world) for name in steps[step][rank]] == batch
    at = 0
    for plan in plans(index):
        epoch = range(at, at := at + plan.num_batches(GLOBAL_BATCH))
        lesions = Counter(name for step in epoch for rank in range(world) for name in steps[step][rank])
        assert lesions == Counter(index.lesion_ids[int(row)] for row in plan.order)
        assert set(lesions) == set(index.lesion_ids)


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "server"])
def test_resume_with_other_world_sizes_after_random_kills(shards, tmp_path, remote):
    kills = 10  # 20 in total: half read a folder, half a server
    worlds = [2, 4, 1, 2, 4, 1, 2, 2, 1, 4, 2]
    with serve(shards) as server:
        for shard in read_index(shards).shards:
            server.faults[shard.url] = [unavailable, short_body]
        launch(WORKER, server.url if remote else str(shards), str(tmp_path), json.dumps([worlds, kills]))
    expected, attempts = planned(read_index(shards)), read_logs(tmp_path)
    done = 0
    for (_, world), steps in sorted(attempts.items()):
        if not steps:
            continue  # killed before its first batch
        assert min(steps) <= done
        for step, ranks in steps.items():
            # Every rank reads its part of the plan, also in steps that were read but not completed.
            part = GLOBAL_BATCH // world
            for rank, lesions in ranks.items():
                assert lesions == expected[step][rank * part : (rank + 1) * part]
        assert sorted(steps) == list(range(min(steps), max(steps) + 1))
        complete = [step for step, ranks in steps.items() if len(ranks) == world]
        done = max([done, *(step + 1 for step in complete)])
    assert int((tmp_path / "consumed").read_text()) == done == len(expected)
    assert len({world for (_, world), steps in attempts.items() if steps}) > 2


def test_error_on_one_rank_ends_all_ranks_with_one_message(shards, tmp_path):
    """A photo damaged after the shards were verified is an error on one rank; the other rank, which waits for it,
    must not hang.
    """
    shutil.copytree(shards, tmp_path / "shards")
    index = read_index(tmp_path / "shards")
    with index.path(int(index.shard[40])).open("rb+") as file:
        file.seek(int(index.offsets[40, 0]))
        file.write(bytes(int(index.sizes[40, 0])))
    (tmp_path / "tiny.yaml").write_text(SETTINGS)
    done = launch(
        "launch.train", "--config", str(tmp_path / "tiny.yaml"), f"data.shards={tmp_path}/shards", "data.verify=false",
        f"output={tmp_path}/run", ranks=2, config="accelerate_configs/ddp.yaml", check=False,
    )  # fmt: skip
    # The other rank says the same, and whose error it is, unless the launcher ends it before.
    errors = [line for line in done.stderr.splitlines() if "error: " in line and "ends because rank" not in line]
    assert done.returncode == 2 and len(errors) == 1, done.stderr[-3000:]
    assert f"the clinical photo of lesion {index.lesion_ids[40]} does not decode" in errors[0]


def test_permanent_server_failure_ends_all_ranks_with_one_error(shards, tmp_path):
    (tmp_path / "tiny.yaml").write_text(SETTINGS)
    with serve(shards) as server:
        shard = read_index(shards).shards[-1].url
        server.faults[shard] = [forbidden] * 1000
        done = launch(
            "launch.train", "--config", str(tmp_path / "tiny.yaml"), f"data.shards={server.url}",
            f"data.remote.cache={tmp_path}/cache", f"output={tmp_path}/run",
            ranks=2, config="accelerate_configs/ddp.yaml", check=False,
        )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == 2 and errors, done.stderr[-3000:]
    assert all(f"{shard}: no permission" in line for line in errors)


def test_training_from_a_server_equals_training_from_a_folder(shards, tmp_path):
    (tmp_path / "tiny.yaml").write_text(SETTINGS)
    with serve(shards) as server:
        for name in ("index.json", "samples.parquet", "shard-000000.tar"):
            server.faults[name] = [unavailable]
        launch(
            "launch.train", "--config", str(tmp_path / "tiny.yaml"), f"data.shards={server.url}", "train.epochs=1",
            f"data.remote.cache={tmp_path}/cache", f"output={tmp_path}/run",
        )  # fmt: skip
    assert len(read_predictions(tmp_path / "run" / "tri" / "fold-0" / "predictions.parquet")) == 50
