"""The counting of system calls of benchmarks.rank_files."""

from __future__ import annotations

from benchmarks.rank_files import count_calls

TRACE = """\
7 newfstatat(AT_FDCWD</work>, "/benchmarks.rank_files/open", 0x7ffe, 0) = -1 ENOENT (No such file or directory)
7 openat(AT_FDCWD</work>, "/data/set/index.json", O_RDONLY|O_CLOEXEC) = 5</data/set/index.json>
7 newfstatat(5</data/set/index.json>, "", {st_mode=S_IFREG|0600, ...}, AT_EMPTY_PATH) = 0
7 read(5</data/set/index.json>, ""..., 8192) = 4096
7 newfstatat(AT_FDCWD</work>, "/data/set/shard-000000.tar", {st_mode=S_IFREG|0644, ...}, 0) = 0
7 read(6</elsewhere/file>, ""..., 8192) = 8192
7 newfstatat(AT_FDCWD</work>, "/benchmarks.rank_files/read", 0x7ffe, 0) = -1 ENOENT (No such file or directory)
8 pread64(9</data/node/shard-000000.tar>, ""..., 60000, 0) = 60000
8 pread64(9</data/node/shard-000000.tar>, ""..., 60000, 0) = -1 EIO (Input/output error)
7 newfstatat(AT_FDCWD</work>, "/benchmarks.rank_files/end", 0x7ffe, 0) = -1 ENOENT (No such file or directory)
7 openat(AT_FDCWD</work>, "/data/set/index.json", O_RDONLY|O_CLOEXEC) = 5</data/set/index.json>
"""


def test_calls_are_counted_by_place_and_phase():
    counts = count_calls(TRACE.splitlines(), {"set": "/data/set/", "node": "/data/node/"})
    assert counts == {
        "set, open": {"opens": 1, "stats": 1, "reads": 1, "MB": 0.004096},
        "node, read": {"reads": 2, "MB": 0.06},
    }
