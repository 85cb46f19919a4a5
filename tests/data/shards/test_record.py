"""The record of a sample: what contradicts itself or cannot be written is refused in one line, as ValueError."""

from __future__ import annotations

import json
from typing import Any

import pytest

from triderm_dist.data.shards.record import belongs_to_lesion, parse_record, split_name
from triderm_dist.schema import UNLABELED, Task
from triderm_dist.tasks import milk10k_task

NUMBERED = Task.from_mapping(
    {
        "name": "numbered",
        "diagnoses": [{"name": "BCC", "words": ["1"]}, {"name": "NV", "words": ["3"]}],
        "views": [{"name": "dermoscopic"}],
        "columns": {"image": "photo"},
        "missing_words": ["-1", "unknown"],
    },
    "task.yaml",
)


@pytest.mark.parametrize(
    ("record", "cls", "label"),
    [
        (b'{"label": 3}', None, 1),
        (b'{"label": 3.0}', None, 1),
        (b'{"label": "3"}', b"3.0", 1),
        (None, b"3.0", 1),
        (None, b"\xef\xbb\xbf3\r\n", 1),
        (b'{"label": null, "diagnosis": "nv"}', None, 1),
        (b'{"label": "unknown"}', b"1", 0),
        (b'{"label": "NV", "diagnosis": "melanocytic nevus"}', None, 1),
        (b'{"label": -1}', None, UNLABELED),
        (b'{"label": -1.0}', None, UNLABELED),
        (None, b"-1", UNLABELED),
        (b"{}", b"", UNLABELED),
    ],
)
def test_label_is_read_from_json_or_cls(record: bytes | None, cls: bytes | None, label: int) -> None:
    assert parse_record("L1", record, cls, NUMBERED).label == label


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


REFUSED: dict[str, tuple[bytes | None, bytes | None, str]] = {
    "cut": (b'{"label": "NV"', None, "cannot be read at line 1, column 15"),
    "encoding": (b'{"label": "\xff"}', None, "not in UTF-8 at byte 11"),
    "depth": (b'{"concepts": ' + nested(100_000) + b"}", None, "nested too deeply"),
    "depth of a list": (nested(100_000), None, "nested too deeply"),
    "text": (b'"NV"', None, "its JSON is a str, not a mapping"),
    "key twice": (b'{"label": "NV", "age": 3, "label": "BCC"}', None, "holds 'label' twice"),
    "nested key twice": (b'{"metadata": {"age": 3, "age": 4}}', None, "holds 'age' twice"),
    "surrogate": (rb'{"group": "\ud800"}', None, r"half of a UTF-16 pair, which is no character: '\ud800'"),
    "surrogate as a name": (rb'{"concepts": {"a\uDfffb": 0.5}}', None, "half of a UTF-16 pair"),
    "two labels": (b'{"label": "NV", "diagnosis": "BCC"}', None, "labels differ: label 'NV', diagnosis 'BCC'"),
    "label in two places": (b'{"label": "NV"}', b"BCC", "labels differ: label 'NV', .cls 'BCC'"),
    "label of a list": (b'{"label": ["NV"]}', None, "label is a list, not a text or number"),
    "label of a truth value": (b'{"label": true}', None, "label is a bool"),
    "group of a mapping": (b'{"group": {"id": 3}}', None, "group is a dict"),
    "cls": (None, b"\xff\xfe1", "its .cls is not a text in UTF-8"),
    "direction of writing": (b'{"group": "P\xe2\x80\xae1"}', None, "group must have"),
    "control character": (rb'{"lesion_id": "L\u00001"}', None, r"lesion_id 'L\x001' must have"),
    "long group": (json.dumps({"group": "P" * 201}).encode(), None, "at most 200 characters"),
    "concept": (rb'{"concepts": {"a\nb": 0.5}}', None, r"the name of the concept 'a\nb' must"),
    "huge number": (b'{"concepts": {"hair": 1e999}}', None, "hair 'inf' is not a score from 0 to 1"),
    "digits": (b'{"label": ' + b"9" * 5000 + b"}", None, ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_records_that_cannot_be_read_are_refused_in_one_line(name: str) -> None:
    record, cls, message = REFUSED[name]
    with pytest.raises(ValueError) as error:
        parse_record("L1", record, cls, milk10k_task())
    text = str(error.value)
    assert message in text and "\n" not in text and len(text) < 300
    text.encode()


def test_a_pair_of_surrogates_is_a_character() -> None:
    assert parse_record("L1", rb'{"group": "\ud83d\ude00"}', None, milk10k_task()).group == "\U0001f600"


def test_groups_that_are_numbers_have_one_spelling() -> None:
    groups = [
        parse_record("L1", json.dumps({"group": each}).encode(), None, NUMBERED).group for each in (12, 12.0, "12")
    ]
    assert groups == ["12"] * 3


@pytest.mark.parametrize("missing", ["NA", "unknown", "-", float("nan"), None, ""])
def test_a_missing_group_is_the_lesion_itself(missing: Any) -> None:
    """Else all lesions of unknown patients would be one group, and so in one fold."""
    task = milk10k_task()
    assert parse_record("L1", json.dumps({"patient_id": missing}).encode(), None, task).group == "L1"
    both = json.dumps({"group": missing, "patient_id": "P1"}).encode()
    assert parse_record("L1", both, None, task).group == "P1"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b.c/L1.clinical.JPG", ("a/b.c/L1", "clinical.jpg")),
        ("./L1.json", ("./L1", "json")),
        ("README", ("", "")),
        ("a.b/README", ("", "")),
        ("._L1.json", ("", "")),
        ("set/._L1.json", ("", "")),
        ("L1.", ("", "")),
        ("__meta__/L1.json", ("", "")),
    ],
)
def test_names_of_members(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


@pytest.mark.parametrize(
    ("names", "lesion"),
    [
        (["md"], False),
        (["txt", "cls"], True),
        (["heic"], True),
        (["a.mpo"], True),
        (["closeup.dcm"], True),
        (["seen"], True),
        ([], False),
    ],
)
def test_what_belongs_to_a_lesion(names: list[str], lesion: bool) -> None:
    extensions: dict[str, Any] = {"clinical": ("seen",), "dermoscopic": ("dermoscopic.jpg",)}
    assert belongs_to_lesion(names, extensions) == lesion
