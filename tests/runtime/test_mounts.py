"""The file system of a path is that of the innermost mount, and the last one at a place."""

from __future__ import annotations

from pathlib import Path

import pytest

from triderm_dist.runtime.mounts import network_file_system

TABLE = """\
22 1 259:1 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p1 rw
40 22 0:50 / /data rw,relatime shared:9 - nfs4 server:/export rw,vers=4.2
41 40 259:2 / /data/local rw - xfs /dev/nvme1n1 rw
42 22 0:51 / /my\\040set rw - lustre mds@tcp:/fs rw
43 22 0:52 / /twice rw - nfs server:/a rw
44 43 259:3 / /twice rw - ext4 /dev/sdb rw
a line of another format
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data", "nfs4"),
        ("/data/set", "nfs4"),
        ("/database", None),
        ("/data/local/set", None),
        ("/my set/shards", "lustre"),
        ("/twice/set", None),
        ("/", None),
    ],
)
def test_the_innermost_mount_counts(tmp_path: Path, path: str, kind: str | None) -> None:
    (tmp_path / "mountinfo").write_text(TABLE)
    assert network_file_system(path, tmp_path / "mountinfo") == kind


def test_a_system_without_the_table_is_taken_for_local(tmp_path: Path) -> None:
    assert network_file_system("/data", tmp_path / "missing") is None
    assert network_file_system(tmp_path) is None
