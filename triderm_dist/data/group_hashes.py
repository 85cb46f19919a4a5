"""Hashes instead of group ids, such as patient ids, in packed sets.

A group is written as the HMAC-SHA256 of its id with a secret salt: equal ids give equal hashes, from which ids cannot
be guessed without the salt. Salt and ids stay in a file next to the packed folder, which only the owner can read:

    FOLDER.groups.csv     # triderm-groups 1, secret: ... salt=64 hexadecimal digits
                          group,hash                        one row per group

A set that is packed again uses the salt in its file. A set that is packed with the salt of another set can be compared
with it. index.json holds a fingerprint of the salt, which does not reveal it.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from triderm_dist.data.ids import MAX_ID
from triderm_dist.data.problems import Problem
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.readers.lesion_table import CHUNK, LesionTable
from triderm_dist.data.readers.text_index import HashIndex
from triderm_dist.data.shards.format import INDEX, Text, to_array
from triderm_dist.data.shards.index_schema import read_index_json
from triderm_dist.files import atomic_path
from triderm_dist.schema import ConfigError, DataError

PRIVATE = 0o600
"""Mode of the file with salt and groups."""
DIGITS = 16
"""Hexadecimal digits of a hash: among ten million groups two are equal with a probability of 3e-6."""
_HEADER = "# triderm-groups 1, secret: names the groups of the packed set beside it; upload it nowhere, salt="
_SALT = re.compile(re.escape(_HEADER) + r"([0-9a-f]{64})\r?\n")
_BEGIN = re.compile(r"^|(?<=[/\\\s()'\"])")
"""Where the name of a folder or file may begin in a text."""
_END = re.compile(r"(?=[/\\.\s()'\",;:])|$")
"""Where the name of a folder, or of a file without its suffix, may end."""


@dataclass(frozen=True)
class GroupHashes:
    """The hashes of groups under a salt. groups: the different ones of a set."""

    salt: bytes = field(repr=False)
    groups: Sequence[str] = field(default=(), repr=False)

    @property
    def fingerprint(self) -> str:
        """What index.json keeps: equal for equal salts."""
        return hashlib.sha256(b"triderm-groups salt " + self.salt).hexdigest()[:DIGITS]

    def of(self, group: str) -> str:
        """Return the hash of a group."""
        digest = hmac.digest(self.salt, group.encode("utf-8", "surrogatepass"), "sha256")
        return digest.hex()[:DIGITS]

    def without_ids(self, problems: Sequence[Problem]) -> list[Problem]:
        """Replace groups that are folders or files in the paths of problems."""
        if not problems:
            return []
        index = HashIndex.of(self.groups)

        def hide(text: str) -> str:
            separators = {at for at, character in enumerate(text) if character in "/\\"}
            ends = [found.start() for found in _END.finditer(text)][::-1] if separators else []
            names = [
                (begin, end)
                for begin in (found.start() for found in _BEGIN.finditer(text))
                for end in ends  # the longest name first
                if begin < end <= begin + MAX_ID and (begin - 1 in separators or end in separators)
            ]
            result, done = "", 0
            for (begin, end), at in zip(names, index.only([text[slice(*name)] for name in names]), strict=True):
                if at >= 0 and begin >= done and self.groups[at] == text[begin:end]:
                    result, done = f"{result}{text[done:begin]}{self.of(text[begin:end])}", end
            return result + text[done:]

        return [replace(each, where=hide(each.where), what=hide(each.what)) for each in problems]


def groups_file(folder: str | os.PathLike[str]) -> Path:
    """Return the path of the file with salt and groups of a packed set."""
    return Path(f"{os.fspath(folder).rstrip('/')}.groups.csv")


@dataclass(frozen=True)
class GroupHashing:
    """How groups are replaced by hashes.

    salt: that of another set (`salt_of`); None: that of the file of groups, else a random one, which is in the file
    before anything is packed with it.  explicit: the user asked for hashes; False leaves groups as they are where the
    output was packed so by an earlier version.
    """

    salt: str | None = None
    explicit: bool = True

    @classmethod
    def of(cls, groups: str, salt: str | None, explicit: bool) -> GroupHashing | None:
        """Return the hashing that settings choose, None for groups=plain.

        Raises ConfigError for a salt that is not used, and DataError as `salt_of`, also where no lesion has a group.
        """
        if groups == "plain":
            if salt is not None:
                raise ConfigError(f"salt={salt}: has no effect with groups=plain; remove one of them")
            return None
        if salt is not None:
            salt_of(salt)
        return cls(salt, explicit)


def hash_groups(
    dataset: Dataset, output: str | os.PathLike[str], hashing: GroupHashing
) -> tuple[Dataset, GroupHashes | None]:
    """Return the data set with hashes instead of groups, and the hashes; unchanged and None if there are no groups.

    The notes of the data set get those of `hashes_for`. output: of which the hashes are, see `groups_file`.
    """
    table = LesionTable.of(dataset.lesions)
    parts = (slice(start, start + CHUNK) for start in range(0, len(table), CHUNK))
    if all(table.group_names(rows) == table.ids[rows].tolist() for rows in parts):
        return dataset, None
    numbers, names = table.distinct_groups()
    groups = pa.DictionaryArray.from_arrays(numbers, names)
    hashes, notes = _write_hashes(table.ids.column, groups, output, hashing, dataset.task.columns.group)
    if hashes:
        hashed = pa.array(map(hashes.of, hashes.groups), pa.string())
        dataset = replace(dataset, lesions=replace(table, groups=Text(pa.chunked_array([hashed])), group=numbers))
    return replace(dataset, notes=[*dataset.notes, *notes]), hashes


def hashes_for(
    lesion_ids: pa.ChunkedArray,
    groups: pa.ChunkedArray,
    output: str | os.PathLike[str],
    hashing: GroupHashing,
    column: str | None = None,
) -> tuple[GroupHashes | None, list[str]]:
    """Write the hashes of groups to the `groups_file` of `output`, and return them and notes; None without any groups.

    lesion_ids, groups: (N,) str.  column: the name of groups. A note says where groups are left as they are, and counts
    lesion ids that hold the id of their group, since those are kept.

    Raises DataError for a file of groups that cannot be read, that holds another salt, or that a packed set lacks.
    """
    if lesion_ids.equals(groups):
        return None, []
    return _write_hashes(lesion_ids, groups.dictionary_encode().combine_chunks(), output, hashing, column)


def _write_hashes(
    lesion_ids: pa.Array | pa.ChunkedArray,
    groups: pa.DictionaryArray,
    output: str | os.PathLike[str],
    hashing: GroupHashing,
    column: str | None,
) -> tuple[GroupHashes | None, list[str]]:
    """Write the hashes of groups (N,) to the file, and return them and notes; None where groups are kept as ids."""
    file, index = groups_file(output), Path(output, INDEX)
    if index.is_file():
        is_hashed = "groups" in read_index_json(index)
        if not is_hashed and not hashing.explicit:
            return None, [f"{output} holds group ids as they are; delete its index and make it again for hashes"]
        if is_hashed and not file.exists():
            raise DataError(
                f"{file}: no such file, and the groups of {output} are hashes under its salt; restore it, or delete "
                "that folder and pack again"
            )
    names = Text(pa.chunked_array([groups.dictionary]))
    hashes = GroupHashes(_own_salt(file, salt_of(hashing.salt) if hashing.salt else None), names)
    numbers = np.fromiter((int(hashes.of(name), 16) for name in names), np.uint64, len(names))
    if len(np.unique(numbers)) < len(names):
        raise DataError(f"{file}: two groups have the same hash under its salt; delete the file to get another one")
    with atomic_path(file, PRIVATE) as temporary:
        _write_private(temporary, hashes)
    return hashes, _note_on_ids(lesion_ids, groups, column)


def read_salt(file: Path) -> bytes:
    """Return the salt in a file of groups. Raises DataError if there is none."""
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            found = _SALT.fullmatch(opened.readline(200))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not readable ({getattr(error, 'strerror', None) or error})") from None
    if not found:
        raise DataError(f"{file}: holds no salt in its first line; give the .groups.csv beside a packed set")
    return bytes.fromhex(found[1])


def salt_of(where: str | os.PathLike[str]) -> bytes | None:
    """Return the salt of another set, given its file of groups or its folder; None for a set without hashed groups.

    Raises DataError as `read_salt` does, and for a folder that is no packed set.
    """
    if not Path(where).is_dir():
        return read_salt(Path(where))
    has_salt = "groups" in read_index_json(Path(where, INDEX))
    return read_salt(groups_file(where)) if has_salt else None


def _own_salt(file: Path, given: bytes | None) -> bytes:
    """Return the salt in `file`, which is created with the given or a random salt if it does not exist."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        _create(file, given or secrets.token_bytes(32))
    salt = read_salt(file)
    if given is not None and given != salt:
        raise DataError(
            f"{file}: holds another salt than the one of salt=; remove salt= to use that of the file, or delete "
            "the file and the packed set beside it"
        )
    return salt


def _create(file: Path, salt: bytes) -> None:
    """Create a file of groups with a salt only, atomically; keep the file of a process that was faster."""
    descriptor, name = tempfile.mkstemp(prefix=f"{file.name}.", suffix=".part", dir=file.parent)
    os.close(descriptor)
    try:
        _write_private(Path(name), GroupHashes(salt))
        os.link(name, file)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        os.replace(name, file)  # a file system without hard links
    finally:
        Path(name).unlink(missing_ok=True)


def _write_private(path: Path, hashes: GroupHashes) -> None:
    """Write a file that exists and that only its owner can read."""
    with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
        file.write(f"{_HEADER}{hashes.salt.hex()}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["group", "hash"])
        writer.writerows((group, hashes.of(group)) for group in _sorted(hashes.groups))


def _sorted(groups: Sequence[str]) -> Iterator[str]:
    if not isinstance(groups, Text):
        yield from sorted(groups)
        return
    order = pc.sort_indices(groups.column)
    for start in range(0, len(order), CHUNK):
        yield from groups.column.take(order.slice(start, CHUNK)).to_pylist()


def _note_on_ids(lesion_ids: pa.Array | pa.ChunkedArray, groups: pa.DictionaryArray, column: str | None) -> list[str]:
    """Return a note on lesions whose id holds that of their group."""
    numbers, first, count = to_array(groups.indices), "", 0
    sizes = np.bincount(numbers)
    for rows in (slice(start, start + CHUNK) for start in range(0, len(groups), CHUNK)):
        ids, own = lesion_ids[rows].to_pylist(), groups[rows].dictionary_decode().to_pylist()
        for lesion, group, size in zip(ids, own, sizes[numbers[rows]].tolist(), strict=True):
            if _reveals_group(lesion, group, size):
                first, count = first or lesion, count + 1
    if not count:
        return []
    return [
        f"{count:,} lesion ids hold the id of their {column or 'group'}, such as {first}; only groups are hashed, so "
        "give these lesions ids of their own before the shards go to others"
    ]


def _reveals_group(lesion: str, group: str, size: int) -> bool:
    """Return whether a lesion id is the id of its group of `size` lesions, or holds it as a word."""
    if lesion == group:
        return size > 1  # a lesion without a group is its own
    return (len(group) >= 5 and group in lesion) or (len(group) >= 3 and group in re.split(r"[^0-9A-Za-z]+", lesion))
