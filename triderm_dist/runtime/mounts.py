"""The file system that a path is on, of the kernel's table of mounts."""

from __future__ import annotations

import os
import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
NETWORK = (
    *("nfs", "nfs3", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "smbfs", "glusterfs", "orangefs"),
    *("pvfs2", "afs", "9p", "virtiofs", "wekafs", "panfs", "fuse.ceph", "fuse.glusterfs", "fuse.sshfs", "fuse.s3fs"),
    *("fuse.gcsfuse", "fuse.mount-s3", "fuse.juicefs", "fuse.rclone", "fuse.goofys", "fuse.blobfuse2", "fuse.dfuse"),
)
"""Kinds of file systems behind a network, as the kernel names them."""
_OCTAL = re.compile(r"\\([0-7]{3})")


def network_file_system(path: str | os.PathLike[str], mounts: Path = MOUNTS) -> str | None:
    """Return the kind of the network file system that a path is on; None for a local one, or if it is unknown."""
    kind = _kind_of_mount(os.path.realpath(path), mounts)
    return kind if kind in NETWORK else None


def _kind_of_mount(path: str, mounts: Path) -> str | None:
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    found, kind = "", None
    for line in lines:
        before, separator, after = line.partition(" - ")
        words = before.split()
        if not separator or len(words) < 5:
            continue
        mounted = _OCTAL.sub(lambda octal: chr(int(octal[1], 8)), words[4])
        holds = path == mounted or path.startswith(f"{mounted.rstrip('/')}/")
        if holds and len(mounted) >= len(found):  # the last of several mounts at one place is the one that is seen
            found, kind = mounted, after.split()[0]
    return kind
