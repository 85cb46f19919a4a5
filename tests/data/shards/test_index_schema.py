"""An index.json of a stranger is bounded and refused in one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from triderm_dist.data.shards.index_schema import check_content, read_index_json
from triderm_dist.schema import DataError

VALID: dict[str, Any] = {
    "format": "triderm-shards",
    "version": 2,
    "concepts": ["hair"],
    "diagnoses": ["BCC", "NV"],
    "metadata_fields": ["age"],
    "shards": [
        {"url": "a.tar", "samples": 1, "bytes": 10240, "sha256": "0" * 64},
        {"url": "b_1.x-y.tar", "samples": 1, "bytes": 10240, "sha256": "1" * 64},
    ],
    "samples": {"url": "samples.parquet", "rows": 2, "bytes": 100, "sha256": "2" * 64},
    "photo_sizes": {"600x450": 4},
    "shared_photos": [["L0", "L1"]],
    "problems": [{"lesion_id": "L3", "kind": "tar", "where": "a.tar", "what": "cut off"}],
    "of a later version": {"any": ["thing"]},
}


def put(*place: Any) -> Callable[[dict[str, Any]], None]:
    """Return a change that sets the entry at keys to a value, the last argument."""
    *keys, last, value = place

    def change(raw: dict[str, Any]) -> None:
        for key in keys:
            raw = raw[key]
        raw[last] = value

    return change


def remove(*place: Any) -> Callable[[dict[str, Any]], None]:
    *keys, last = place

    def change(raw: dict[str, Any]) -> None:
        for key in keys:
            raw = raw[key]
        del raw[last]

    return change


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "huge photos": (put("photo_sizes", {"65000x65000": 4}), "photo_sizes holds the photo size '65000x65000'"),
    "wide photos": (put("photo_sizes", {"100000x1": 4}), "holds the photo size '100000x1'"),
    "no photo": (put("photo_sizes", {"0x600": 4}), "holds the photo size '0x600'"),
    "signed": (put("photo_sizes", {"-600x-450": 4}), "holds the photo size '-600x-450'"),
    "other digits": (put("photo_sizes", {"６００x450": 4}), "holds the photo size"),
    "no sizes": (put("photo_sizes", {}), "photo_sizes is empty"),
    "list of sizes": (put("photo_sizes", [[600, 450]]), "photo_sizes should be a valid dictionary"),
    "negative count": (put("photo_sizes", "600x450", -1), "photo_sizes.600x450 should be greater than or equal to 1"),
    "count in words": (put("photo_sizes", "600x450", "4"), "photo_sizes.600x450 should be a valid integer"),
    "negative bytes": (put("shards", 1, "bytes", -1), r"shards[1].bytes should be greater than"),
    "huge bytes": (put("shards", 1, "bytes", 1 << 63), r"shards[1].bytes should be less than"),
    "huger bytes": (put("shards", 1, "bytes", 10**400), r"shards[1].bytes should be"),
    "bytes with a point": (put("shards", 1, "bytes", 1e3), r"shards[1].bytes should be a valid integer"),
    "true": (put("shards", 1, "samples", True), r"shards[1].samples should be a valid integer"),
    "hash": (put("shards", 0, "sha256", "none"), r"shards[0].sha256"),
    "no hash": (remove("shards", 0, "sha256"), r"has no 'shards[0].sha256', so it is incomplete"),
    "unknown entry": (put("shards", 0, "path", "/etc/passwd"), r"has an unknown entry 'shards[0].path'"),
    "no shard": (put("shards", []), "shards "),
    "shards by name": (put("shards", {"a.tar": {}}), "shards should be a valid list"),
    "shard twice": (put("shards", 1, "url", "A.tar"), "lists the shard a.tar twice"),
    "rows": (put("samples", "rows", -2), "samples.rows should be"),
    "other table": (put("samples", "url", "../x.parquet"), "samples.url String should match"),
    "concept twice": (put("concepts", ["hair", "hair"]), "concepts names 'hair' twice"),
    "concept": (put("concepts", [3]), "concepts[0] should be a valid string"),
    "escape": (
        put("concepts", ["\x1b[31mhair"]),
        r"concepts[0] '\x1b[31mhair' holds characters that are not printable",
    ),
    "direction": (put("metadata_fields", ["\u202eega"]), "holds characters that are not printable"),
    "text of concepts": (put("concepts", "hair"), "concepts should be a valid list"),
    "many concepts": (put("concepts", [f"c{n}" for n in range(10_001)]), "concepts "),
    "diagnoses": (put("diagnoses", None), "diagnoses should be a valid list"),
    "three": (put("shared_photos", [["L0", "L1", "L2"]]), "shared_photos[0]"),
    "problem": (put("problems", [{"lesion_id": "L3"}]), "has no 'problems[0].kind'"),
    "short side": (put("packed_with", {"short_side": 0}), "packed_with.short_side should be"),
    "extensions": (put("extensions", {"clinical": "jpg"}), "extensions.clinical should be a valid list"),
    "labels": (put("labels", {"nv": 1}), "labels.nv should be a valid string"),
}
NAMES = [
    *("", "..", "/a.tar", "../a.tar", "a/b.tar", "a b.tar", "-rf.tar", ".a.tar", "x$(id).tar", "a;b.tar", "a.tar\n"),
    *("pipe:cat a.tar", "http://a.tar", "a\\b.tar", "index.json", "a.tar.lock", "ä.tar", "%2e.tar", "a\0.tar"),
    "x" * 300,
]


def error_of(raw: dict[str, Any]) -> str:
    with pytest.raises(DataError) as error:
        check_content(raw, Path("index.json"))
    text = str(error.value)
    assert text.startswith("index.json: ") and text.endswith("; pack or index the data again")
    assert text.isprintable() and len(text) < 400
    return text


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_entries_are_refused(name: str) -> None:
    change, message = HOSTILE[name]
    raw = copy.deepcopy(VALID)
    change(raw)
    assert message in error_of(raw)


@pytest.mark.parametrize("name", NAMES)
def test_names_that_leave_the_folder_or_reach_a_shell_are_refused(name: str) -> None:
    raw = copy.deepcopy(VALID)
    raw["shards"][0]["url"] = name
    assert "shards[0].url" in error_of(raw) and "is not a file name of a shard" in error_of(raw)


def test_every_entry_that_is_read_is_required() -> None:
    for name in set(VALID) - {"format", "version", "of a later version"}:
        assert f"has no '{name}'" in error_of({key: value for key, value in VALID.items() if key != name})
    assert check_content(VALID, Path("index.json")).samples.file.samples == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable as JSON"),
        (b"\xff\xfe\0", "not readable as JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"shards": [], "shards": [1]}', "names 'shards' twice"),
        (b"[1]", "not an index of shards"),
        (json.dumps(VALID).encode()[:-9], "not readable as JSON"),
    ],
)
def test_files_that_are_no_json_mapping_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(DataError, match=f"index.json: .*{message}") as error:
        read_index_json(tmp_path / "index.json")
    assert "\n" not in str(error.value)
