"""Read the member headers of a plain tar up to its end, and report where and how it is damaged.

`tarfile` takes a damaged or missing header for the end of the archive, as do readers built on it. A tar is read
completely only if nothing but zero blocks follows its last member, and at least two of them (POSIX.1-1988, ustar).
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from triderm_dist.file_kinds import START, kind_of
from triderm_dist.runtime.messages import printable

BLOCK = tarfile.BLOCKSIZE
_END_BLOCKS = 2
_CHUNK = 1 << 20
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    b"M": "the rest of a file of another volume",
}
# A folder, GNU's list of a folder, and a volume's label have no data.
_WITHOUT_DATA = (tarfile.DIRTYPE, b"D", b"V")


class DamagedTar(Exception):
    """A tar that cannot be read to its end; the message names the byte and what is there."""


@dataclass(frozen=True)
class TarMember:
    """A member that is not a folder: its name, and where its data lie.

    fault: what the member is if it is not a plain file, so that its data are elsewhere; else empty.
    """

    name: str
    offset: int
    size: int
    fault: str = ""


def tar_members(path: Path) -> Iterator[TarMember]:
    """Yield the members of a plain tar in order. Raises DamagedTar after the last one that can be read, OSError."""
    size = path.stat().st_size
    if not size:
        raise DamagedTar("an empty file")
    with path.open("rb") as file:
        start = file.read(START)
        file.seek(0)
        before = 0
        try:
            tar = tarfile.TarFile(fileobj=file, encoding="utf-8")
            member = tar.next()
        except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError):
            kind = kind_of(start)
            what = "damaged at byte 0: no header of a member" if kind == "a tar archive" else f"{kind}, not a plain tar"
            raise DamagedTar(what) from None
        # The end of a tar leaves the offset where it is, and a member moves it on. With a header of a negative size, a
        # member may move it back, and by newer versions of Python be taken for the end.
        while member is not None or tar.offset > before:
            if member is None or tar.offset <= before:
                raise DamagedTar(f"damaged at byte {before}: the header of a member has a negative size")
            tar.members.clear()  # type: ignore[attr-defined]  # else it keeps every header
            if member.type not in _WITHOUT_DATA:
                name = printable(member.name)
                if not 0 <= member.size <= size - member.offset_data and not member.issparse():
                    raise DamagedTar(f"{name} is truncated: {member.size} bytes from byte {member.offset_data}")
                yield TarMember(member.name, member.offset_data, member.size, _fault(member))
            try:
                before, member = tar.offset, tar.next()
            except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError):
                raise DamagedTar(f"damaged or cut off near byte {tar.offset}: no header of a member") from None
        _check_end(file, tar.offset, size)


def check_tar_end(path: Path) -> None:
    """Raise DamagedTar where a tar's members do not reach to its end, or its end is not one."""
    for _ in tar_members(path):
        pass


def _fault(member: tarfile.TarInfo) -> str:
    if member.issparse():
        return "stored as a sparse file"
    return "" if member.isreg() else _KINDS.get(member.type, f"of the unknown type {member.type!r}")


def _check_end(file: IO[bytes], end: int, size: int) -> None:
    """Raise DamagedTar unless zero blocks follow the last member, which ends at byte `end`, up to the file's end."""
    position = end
    while position < size:
        file.seek(position)
        chunk = file.read(_CHUNK)
        if not chunk:
            break
        if rest := chunk.lstrip(b"\0"):
            found = position + len(chunk) - len(rest)
            if found < end + BLOCK:
                raise DamagedTar(f"damaged at byte {end}: neither the header of a member nor the end of the tar")
            raise DamagedTar(
                f"more data at byte {found}, after the end of the tar at byte {end}: a damaged header, or tars "
                "joined by cat (join them by tar --concatenate)"
            )
        position += len(chunk)
    if size - end < _END_BLOCKS * BLOCK:
        raise DamagedTar(f"cut off at byte {size}: without the {_END_BLOCKS} zero blocks that end a tar")
