"""A tar is read to its end, or the place of its damage is named: never fewer members without a word."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from triderm_dist.data.shards.tar_members import BLOCK, DamagedTar, check_tar_end, tar_members

NAMES = ("L0.json", "L1.json", f"{'x' * 90}/L2.json", "L3.json")


def write(path: Path, kind: int = tarfile.PAX_FORMAT) -> list[tarfile.TarInfo]:
    """Write four members of 600 bytes, one with a long name; return them as tarfile reads them."""
    with tarfile.open(path, "w", format=kind) as tar:
        for name in ("folder", *NAMES):
            info = tarfile.TarInfo(name)
            if name == "folder":
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = 600
                tar.addfile(info, io.BytesIO(name[-7:].encode() * 100))
    with tarfile.open(path) as tar:
        return tar.getmembers()[1:]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_member_is_read(tmp_path: Path, kind: int) -> None:
    expected = write(tmp_path / "a.tar", kind)
    members = [*tar_members(tmp_path / "a.tar")]
    assert [(each.name, each.offset, each.size, each.fault) for each in members] == [
        (each.name, each.offset_data, 600, "") for each in expected
    ]
    data = (tmp_path / "a.tar").read_bytes()
    # No padding to a record, and more than one record of padding.
    for ending in (2 * BLOCK, 10 * tarfile.RECORDSIZE):
        (tmp_path / "b.tar").write_bytes(data.rstrip(b"\0") + bytes(ending + BLOCK))
        assert [each.name for each in tar_members(tmp_path / "b.tar")] == [*NAMES]


def flip(position: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def test_any_flipped_byte_of_a_header_is_named(tmp_path: Path) -> None:
    """In the fields that readers depend on: name, size, checksum, type."""
    members, path = write(tmp_path / "a.tar"), tmp_path / "b.tar"
    data = (tmp_path / "a.tar").read_bytes()
    for member in (members[0], members[1], members[3]):
        for field in (0, 124, 135, 148, 156, 260):
            path.write_bytes(flip(member.offset + field)(data))
            with pytest.raises(DamagedTar, match=r"^damaged (at|or cut off near) byte \d+: "):
                check_tar_end(path)


def test_every_cut_is_named(tmp_path: Path) -> None:
    members, path = write(tmp_path / "a.tar"), tmp_path / "b.tar"
    data = (tmp_path / "a.tar").read_bytes()
    end = members[-1].offset_data + 2 * BLOCK
    cuts = {*range(1, end + 2 * BLOCK, 97), *range(BLOCK, end + 2 * BLOCK, BLOCK), end + 2 * BLOCK - 1}
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        with pytest.raises(DamagedTar, match=r"damaged|cut off|truncated|not a plain tar"):
            check_tar_end(path)


def size_field(member: tarfile.TarInfo, field: bytes) -> Callable[[bytes], bytes]:
    """Return a change that sets a member's size, with a valid checksum."""

    def change(data: bytes) -> bytes:
        header = bytearray(data[member.offset : member.offset + BLOCK])
        header[124:136] = field
        header[148:156] = b"        "
        header[148:156] = b"%06o\0 " % sum(header)
        return data[: member.offset] + bytes(header) + data[member.offset + BLOCK :]

    return change


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "joined": (
        lambda data: data + data,
        r"more data at byte \d+, after the end of the tar at byte \d+: .*joined by cat",
    ),
    "trailing text": (lambda data: data + b"-- signature", "more data at byte"),
    "hole": (lambda data: data[:2048] + bytes(BLOCK) + data[2560:], "more data at byte 2560, after .* at byte 2048"),
    "one zero block": (
        lambda data: data.rstrip(b"\0").ljust(-(-len(data.rstrip(b"\0")) // 512) * 512 + 512, b"\0"),
        "cut",
    ),
    "empty": (lambda data: b"", "an empty file"),
    "web page": (lambda data: b"<!DOCTYPE html>" + data, "a web page, not a plain tar"),
    "gzip": (lambda data: b"\x1f\x8b\x08" + data, "a gzip file, not a plain tar"),
    "pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "short": (lambda data: data[:100], "not a plain tar"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    change, message = DAMAGE[name]
    write(tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes(change((tmp_path / "a.tar").read_bytes()))
    with pytest.raises(DamagedTar, match=message):
        check_tar_end(tmp_path / "b.tar")


@pytest.mark.parametrize("field", [b"77777777777\0", b"\x80" + bytes(3) + b"\x7f" * 8, b"\xff" * 12])
def test_false_sizes_are_named(tmp_path: Path, field: bytes) -> None:
    member = write(tmp_path / "a.tar", tarfile.GNU_FORMAT)[1]
    (tmp_path / "b.tar").write_bytes(size_field(member, field)((tmp_path / "a.tar").read_bytes()))
    with pytest.raises(DamagedTar, match=r"L1.json is truncated|damaged at byte 2048"):
        check_tar_end(tmp_path / "b.tar")


def header(name: str, kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


HOSTILE: dict[str, bytes] = {
    "file that begins before its header": header("L0.json", tarfile.REGTYPE, -1024),
    "other member that begins before its header": header("L0.json", b"Q", -1024),
    "name of a negative length": header("L0.json", tarfile.GNUTYPE_LONGNAME, -512) + header("a", b"0", 0),
    "pax header of a negative length": header("L0.json", tarfile.XHDTYPE, -512) + header("a", b"0", 0),
    "names of names": b"".join(header("L0.json", tarfile.GNUTYPE_LONGNAME, 1) + bytes(BLOCK) for _ in range(3000)),
    "size in words": header("L0.json", b"0", 0).replace(b"00000000000", b"zzzzzzzzzzz"),
    "a negative size in a pax header": header("x", tarfile.XHDTYPE, 14) + b"14 size=-1024\n".ljust(BLOCK, b"\0")
    + header("L0.json", b"0", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("first", [True, False])
def test_hostile_headers_end_the_reading(tmp_path: Path, name: str, first: bool) -> None:
    before = b"" if first else header("L.json", b"0", 0) + header("folder", tarfile.DIRTYPE, 0)
    (tmp_path / "a.tar").write_bytes(before + HOSTILE[name] + bytes(4 * BLOCK))
    with pytest.raises(DamagedTar):
        check_tar_end(tmp_path / "a.tar")


def test_an_archive_without_members_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(tarfile.RECORDSIZE))
    assert [*tar_members(tmp_path / "a.tar")] == []


def test_members_without_data_of_their_own_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, b"Q"):
            info = tarfile.TarInfo("L0.json")
            info.type, info.linkname = kind, "L1.json"
            tar.addfile(info)
    faults = [each.fault for each in tar_members(tmp_path / "a.tar")]
    assert faults == ["a hard link", "a symbolic link", "a pipe", "a device", "of the unknown type b'Q'"]


def test_sparse_members_are_named(tmp_path: Path) -> None:
    """Of GNU's format and of pax: their data lie in pieces."""
    info = tarfile.TarInfo("L0.clinical.jpg")
    info.pax_headers = {"GNU.sparse.map": "0,512", "GNU.sparse.size": "4096", "GNU.sparse.numblocks": "1"}
    info.size = 512
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(bytes(512)))
    assert [each.fault for each in tar_members(tmp_path / "a.tar")] == ["stored as a sparse file"]


def test_names_are_read_as_utf8_and_other_bytes_are_kept(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("Läsion.json"))
    assert [each.name for each in tar_members(tmp_path / "a.tar")] == ["L\udce4sion.json"]
