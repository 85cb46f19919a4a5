"""Dataclasses from mappings of files: nested ones, null, and one line for what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from triderm_dist.schema import ConfigError
from triderm_dist.schema.mapping import as_mapping, build_dataclass


@dataclass(frozen=True)
class Part:
    name: str
    size: float = 1.0
    known: bool | None = None


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    where: str | Mapping[str, str] = "here"
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    first: Part | None = None


def test_nested_mapping_round_trips():
    raw = {"parts": [{"name": "a", "size": 2.5, "known": False}, {"name": "b"}], "words": {"x": ["y", "z"]}}
    whole = build_dataclass(Whole, raw)
    assert whole == Whole((Part("a", 2.5, False), Part("b")), words={"x": ("y", "z")})
    assert as_mapping(whole) == raw
    assert build_dataclass(Whole, as_mapping(whole)) == whole


def test_either_type_of_a_field_is_read():
    assert build_dataclass(Whole, {"parts": [], "where": {"left": "l"}}).where == {"left": "l"}
    assert build_dataclass(Whole, {"parts": [], "where": 3}).where == "3"
    assert build_dataclass(Whole, {"parts": [], "first": {"name": "a"}}).first == Part("a")


def test_null_is_none_or_empty():
    assert build_dataclass(Whole, {"parts": None, "words": "~", "first": "null"}) == Whole((), words={})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "the file: expected a mapping of keys, got a list"),
        ({}, "parts: is missing"),
        ({"parts": [{"size": 1}]}, r"parts\[0\]\.name: is missing"),
        ({"parts": [{"name": "a", "sise": 1}]}, r"unknown key 'parts\[0\]\.sise'; did you mean 'size'"),
        ({"parts": [{"name": "a", "size": "many"}]}, r"parts\[0\]\.size: expected a number, got 'many'"),
        ({"parts": [{"name": ["a"]}]}, r"parts\[0\]\.name: expected text, got a list"),
        ({"parts": [{"name": "a", "known": 3}]}, r"parts\[0\]\.known: expected true or false, got 3"),
        ({"parts": {"a": 1}}, "parts: expected a list, got a mapping"),
        ({"parts": [], "words": {"x": "y"}}, "words.x: expected a list, got 'y'"),
    ],
)
def test_what_does_not_fit_is_named(raw, message):
    with pytest.raises(ConfigError, match=message):
        build_dataclass(Whole, raw)
