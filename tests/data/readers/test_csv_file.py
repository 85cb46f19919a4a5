"""CSV files of all dialects and encodings are read alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from triderm_dist.data.readers import csv_file, table
from triderm_dist.data.readers.csv_file import NotUtf8
from triderm_dist.data.readers.table import read_table
from triderm_dist.schema import DataError, TableFormat


def write(path: Path, text: str | bytes, encoding: str = "utf-8") -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


LINES = {
    "plain": "a,b\n1, x \n2,\n3,z\n",
    "crlf": "a,b\r\n1,x\r\n\r\n2,y\r\n",
    "blank rows": "a,b\n1,x\n,\n  , \n4,y\n\n6,z\n",
    "quotes": 'a,b\n1,x\n2,"two\nlines, ""quoted"""\n4,y\n5,"z"\n6,w\n',
    "more cells": "a,b\n1,x,,\n2,y\n3,z, \n",
    "accents": "a,b\n1,e\u0301\n2,\u00e9\n3,\u3000x\n",
    "carriage returns": "a,b\r1,x\r2,y\r",
    "no end": "a,b\n1,x\n2,y",
    "one column": "a\n1\n\n3\n",
}


@pytest.mark.parametrize("text", LINES.values(), ids=LINES)
def test_blocks_of_lines_are_read_as_pythons_csv_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "t.csv").write_bytes(text.encode())

    def read() -> tuple[dict[str, list[str]], list[int]]:
        found = read_table(tmp_path / "t.csv")
        return {name: cells.to_pylist() for name, cells in found.cells.items()}, found.numbers[:]

    whole = read()
    for characters in (1, 9, 17):
        monkeypatch.setattr(csv_file, "_BLOCK", characters)
        assert read() == whole
    monkeypatch.setattr(table, "plain_columns", lambda *arguments: None)
    assert read() == whole


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("id,Age\na,1\nb,2\n", "utf-8"),
        ("id;Age\r\na;1\r\nb;2\r\n", "utf-8-sig"),
        ("id\tAge\na\t1\nb\t2\n", "utf-16"),
        ("id\tAge\na\t1\nb\t2\n", "utf-16-le"),
        ("sep=;\nid;Age\na;1\nb;2\n", "utf-8"),
        ("id|Age\n a | 1\nb|2", "utf-8"),
        ("id\tAge\na\t1\nb\t2\n", "utf-16-be"),
        ("id,Age\na,1\nb,2\n", "utf-32"),
        ("\ufeff\ufeffid,A\u200bge \na,1\nb,2\n", "utf-8"),
        ('"id","\nAge"\ra,1\rb,2\r', "utf-8"),
        (",,,\nid,,Age,,\n,,,,\na,,1,,\n,,\nb,,2,,,\n\n", "utf-8"),
        ('"id","Age"\n"a","1"\n"b","2"\n', "utf-8"),
    ],
    ids=[
        "comma",
        "semicolon",
        "utf-16",
        "utf-16-le",
        "sep",
        "bar",
        "utf-16-be",
        "utf-32",
        "marks",
        "cr",
        "blank",
        "quoted",
    ],
)
def test_all_csv_dialects_are_read_alike(tmp_path: Path, text: str, encoding: str) -> None:
    table = read_table(write(tmp_path / "a.csv", text, encoding)).named(["age"])
    assert [cells for _, cells in table.rows()] == [{"id": "a", "age": "1"}, {"id": "b", "age": "2"}]


def test_text_is_read_in_the_encoding_of_the_task(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id;größe\na;5\n", "cp1252")
    assert read_table(path, TableFormat(encoding="cp1252")).header == ["id", "größe"]
    with pytest.raises(NotUtf8, match=r"write table: \{encoding: cp1252\} in task.yaml, or save it as 'CSV UTF-8'"):
        read_table(path)
    for name in ("windows", "hex"):  # the second one is not of text
        with pytest.raises(DataError, match=f"unknown encoding '{name}'"):
            read_table(path, TableFormat(encoding=name))
    with pytest.raises(DataError, match="is not in utf-8 "):
        read_table(path, TableFormat(encoding="utf-8"))
