"""Settings from YAML and the command line: parsed by type, strict, with helpful errors."""

import os
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import Field, field_validator

from triderm_dist.runtime.messages import unsafe_character
from triderm_dist.schema import ConfigError
from triderm_dist.settings import (
    PathText,
    Section,
    SourceText,
    describe,
    parse_yaml,
    read_mapping,
    read_override,
    untyped,
    validate,
)


class Inner(Section):
    rate: float = Field(0.5, gt=0, le=1, description="a rate")
    free: dict[str, object] = Field(default_factory=dict, description="anything")


class Outer(Section):
    name: str = Field("a", description="a name")
    folder: PathText = Field("runs", description="a folder")
    source: SourceText = Field("timm:x", description="a source")
    count: int | None = Field(None, ge=1, description="a number")
    flag: bool = Field(True, description="a switch")
    names: tuple[str, ...] | None = Field(None, description="names")
    numbers: tuple[int, ...] = Field((0,), description="numbers")
    kinds: tuple[Literal["x", "y"], ...] = Field(("x",), description="kinds")
    pull: float | Literal["auto"] = Field("auto", description="pull")
    power: Literal[1, 2, 4] = Field(4, description="power")
    inner: Inner = Inner()
    many: dict[str, Inner] = Field(default_factory=dict)
    several: tuple[Inner, ...] = ()


def read(override: str) -> Outer:
    return validate(Outer, read_override(override))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("name=2024-11-25", "name", "2024-11-25"),
        ("name=00123", "name", "00123"),
        ("name=1.10", "name", "1.10"),
        ("name=yes", "name", "yes"),
        ("name='null'", "name", "null"),
        ('name="a, b"', "name", "a, b"),
        ("folder=runs/try #2", "folder", "runs/try #2"),
        ("folder=a: b", "folder", "a: b"),
        ("folder=~/x", "folder", os.path.expanduser("~/x")),
        ("folder=a~/x", "folder", "a~/x"),
        ("source=local-dir:~/x", "source", f"local-dir:{os.path.expanduser('~/x')}"),
        ("source=timm:m@~/w.pth", "source", f"timm:m@{os.path.expanduser('~/w.pth')}"),
        ("count=3", "count", 3),
        ("count=null", "count", None),
        ("flag=false", "flag", False),
        ("flag=no", "flag", False),
        ("names=a,b", "names", ("a", "b")),
        ("names=a, b", "names", ("a", "b")),
        ("names=00123", "names", ("00123",)),
        ("names=[00123, '4,5']", "names", ("00123", "4,5")),
        ("names=[]", "names", ()),
        ("names=null", "names", None),
        ("numbers=1,2", "numbers", (1, 2)),
        ("numbers=[1, 2]", "numbers", (1, 2)),
        ("kinds=y,x", "kinds", ("y", "x")),
        ("pull=auto", "pull", "auto"),
        ("pull=1e-4", "pull", 1e-4),
        ("name= a ", "name", "a"),
        ("count=1e3", "count", 1000),
        ("power=2", "power", 2),
        ("inner.rate=1e-4", "inner", Inner(rate=1e-4)),
        ("inner={rate: 1e-4}", "inner", Inner(rate=1e-4)),
        ("inner.free={a: 1e-4, b: [x, 2], c: no}", "inner", Inner(free={"a": 1e-4, "b": ["x", 2], "c": "no"})),
        ("many.a.rate=0.1", "many", {"a": Inner(rate=0.1)}),
        ("several=[{rate: 1e-4, free: {a: no}}]", "several", (Inner(rate=1e-4, free={"a": "no"}),)),
    ],
)
def test_value_is_parsed_by_the_type_of_its_setting(override, key, value):
    assert getattr(read(override), key) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name=", "name: no value after '='; write name=VALUE"),
        ("names= ", "names: no value after '='"),
        ("name", "'name' is not a setting; write key.subkey=value"),
        ("=3", "'=3' is not a setting"),
        ("count=many", r"count: input should be a valid integer.* \(got 'many'\)"),
        ("name=null", r"name: input should be a valid string \(got null\)"),
        ("names=a,,b", "names.1: input should be a valid string"),
        ("names=[a", r"names: '\[a': not readable as YAML"),
        ("inner={rate: 1, rate: 1}", "inner: .*'rate' is written twice, in lines 1 and 1"),
        ("inner=3", "inner: a section of settings; write inner.NAME=VALUE"),
        ("many=3", "many: a section of settings; write many.NAME=VALUE"),
        ("power=true", r"power: input should be 1, 2 or 4 \(got 'true'\)"),
        ("count=true", r"count: input should be a valid integer.* \(got 'true'\)"),
        (f"count={'9' * 30}", r"count: the number is too large \(got 9+\)"),
        (f"count={'9' * 5000}", r"count: .*integer.* \(got '9{70,} \.\.\.\)"),
        ("inner.rate=nan", "inner.rate: input should be a finite number"),
        ("pull=1e999", "pull: input should be a finite number"),
        ("pull=1e300", r"pull: the number is too large \(got 1e\+300\)"),
        ("pull=-1e39", "pull: the number is too large"),
        ("inner.free={a: 1e39}", "inner.free.a: the number is too large"),
        ("inner.free={a: [.inf]}", r"inner.free.a.0: a finite number is needed \(got inf\)"),
        ("inner.free={a: 1e999}", r"inner.free.a: a finite number is needed \(got inf\)"),
        ("folder=$SCRATCH/x", r"folder: \$SCRATCH is not replaced here; write the path itself"),
        ("source=local-dir:$HOME/x", r"source: \$HOME is not replaced here"),
        ("folder=~no_such_user/x", "folder: ~no_such_user is no user of this machine"),
        ("folder=''", "folder: the path is empty"),
        ("source=' '", "source: the path is empty"),
        ("folder=a\0b", r"folder: the path holds U\+0000"),
        ("folder=a\nb", r"folder: the path holds U\+000A"),
        ("folder=a\r", "folder: ends with a carriage return; remove the Windows line ends of the script"),
        ("name=a\x1b[31m", r"name: the text holds U\+001B"),
        ("name=a\u202eb", r"name: the text holds U\+202E \(right-to-left override\)"),
        ("many={a\u202eb: {}}", r"many: the text holds U\+202E"),
        ("inner..rate=1", "an empty name between the dots"),
        ("several=3", r"several.0: a mapping of settings; write several=\[\{NAME: VALUE\}\]"),
        ("several.0.rate=0.1", r"several: a list, which is set as a whole; write several=\[VALUE, ...\]"),
        ("several=[{raet: 0.1}]", r"unknown setting 'several.0.raet'; did you mean 'several\[\].rate'\?"),
        ("many.a.raet=0.1", r"unknown setting 'many.a.raet'; did you mean 'many.NAME.rate'\?"),
    ],
)
def test_invalid_value_gives_one_line(override, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(override)
    assert "\n" not in str(error.value)


TEXT = st.text(st.characters().filter(lambda character: not unsafe_character(character)), min_size=1)


@given(TEXT)
def test_string_values_are_not_converted(text):
    """Except null, brackets, and quoted strings."""
    assume(text.strip() and text[0] not in "[{'\"" and text not in ("null", "Null", "NULL", "~"))
    assert read(f"name={text}").name == text


@given(TEXT, st.lists(TEXT), st.one_of(st.none(), st.integers(1, 10**9)), st.floats(1e-300, 1))
def test_saved_settings_round_trip(text, names, count, rate):
    config = Outer(name=text, names=tuple(names), count=count, inner=Inner(rate=rate, free={"a": [text, rate, count]}))
    text = yaml.safe_dump(config.model_dump(mode="json"))
    assert validate(Outer, parse_yaml(text, "test.yaml")) == config


@given(st.lists(st.text("abc123_- ", min_size=1).filter(str.strip), min_size=1))
def test_both_list_syntaxes_are_equal(names):
    names = [name.strip() for name in names]
    assume(not any(name.startswith(("-", "null")) for name in names))
    assert read(f"names={','.join(names)}") == read(f"names=[{', '.join(names)}]")


@pytest.mark.parametrize(
    ("text", "value"),
    [("-3", -3), ("1e-4", 1e-4), (".5", 0.5), ("1.", 1.0), (".inf", float("inf")), ("true", True), ("null", None),
     ("", None), ("no", "no"), ("010", "010"), ("1:30", "1:30"), ("2024-11-25", "2024-11-25"), ("'1'", "1")],
)  # fmt: skip
def test_untyped_values_follow_yaml_1_2(text, value):
    found = untyped(parse_yaml(f"a: {text}", "test.yaml"))["a"]
    assert (found, type(found)) == (value, type(value))


def test_duplicate_key_is_refused_with_both_line_numbers(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text("a: 1\nb: {c: 1}\nd:\n  e: 1\n  f: 2\n  e: 3\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: 'e' is written twice, in lines 4 and 6"):
        read_mapping(file, "")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]\n" for below, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\n'a': 2\n", "'a' is written twice, in lines 1 and 2"),
        ("a: {b: 1,\n  b: 2}\n", "'b' is written twice, in lines 1 and 2"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n  <<: *a\n", "'<<' is written twice, in lines 3 and 4"),
        (BOMB, "aliases stand for more than 100,000 values or 50 levels"),
        ("a: &a {b: *a}\n", "line 1: an alias of what holds it"),
        ("a: &a [*a]\n", "line 1: an alias of what holds it"),
        ("a: " + "[" * 5000, "line 1: more than 50 levels"),
        ("".join(f"{' ' * level}a:\n" for level in range(60)), "line 5.: more than 50 levels"),
        ("? [a, b]\n: 1\n", "line 1: a key is a list or a mapping"),
        ("a: b: c\n", r"not readable as YAML \(line 1, column 5: mapping values are not allowed here\)"),
        ("a: 1\n---\na: 2\n", r"not readable as YAML \(line 2, column 1: but found another document\)"),
        ("a: !!int x\n", r"not readable as YAML \("),
        ("a: !!python/object/apply:os.getcwd []\n", r"not readable as YAML \(line 1, column 4: could not determine"),
        ("a: \u00e4\n".encode("utf-16"), "is in UTF-16; save it as UTF-8"),
        ("b: 1\na: \u00e4\n".encode("latin-1"), r"line 2 is not in UTF-8 \(byte 0xe4\)"),
        (b"a: b\0c\n", "not readable as YAML"),
        (b"#" * (1 << 20) + b"\n", "more than 1 MiB"),
        ("a.b: 1\n", "unknown setting 'a.b'; write nested mappings"),
    ],
)
def test_yaml_file_that_contradicts_itself_or_has_no_bounds_is_refused(tmp_path: Path, content: str | bytes, message):
    path = tmp_path / "a.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as error:
        validate(Outer, read_mapping(path, ""))
    assert "\n" not in str(error.value)


def test_mark_of_the_byte_order_is_no_part_of_the_first_key(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("\ufeffname: b\n", encoding="utf-8")
    assert validate(Outer, read_mapping(path, "")).name == "b"


def test_anchors_and_merge_keys_are_read(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "many:\n  a: &x {rate: 0.1, free: {k: 1}}\n  b: {<<: *x, rate: 0.2}\n  c: &y {<<: *x}\n  d: {<<: *y}\n"
    )
    many = validate(Outer, read_mapping(file, "")).many
    assert [many[name].rate for name in "abcd"] == [0.1, 0.2, 0.1, 0.1]


@pytest.mark.parametrize(("text", "message"), [("- 1", "got a list"), ("3", "got a scalar"), ("a: [", "not readable")])
def test_file_without_a_mapping_gives_one_line(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_mapping(tmp_path / "a.yaml", "")
    assert "\n" not in str(error.value)


def test_types_are_described_in_yaml_terms():
    rows = {key: (type_name, default) for key, type_name, default, _ in describe(Outer)}
    assert rows == {
        "name": ("text", "a"),
        "folder": ("path", "runs"),
        "source": ("text", "timm:x"),
        "count": ("integer >= 1 or null", "null"),
        "flag": ("true or false", "true"),
        "names": ("list of text or null", "null"),
        "numbers": ("list of integer", "[0]"),
        "kinds": ("list of one of x | y", "[x]"),
        "pull": ("number or auto", "auto"),
        "power": ("one of 1 | 2 | 4", "4"),
        "inner.rate": ("number > 0, <= 1", "0.5"),
        "inner.free": ("mapping", "{}"),
        "many.NAME.rate": ("number > 0, <= 1", "0.5"),
        "many.NAME.free": ("mapping", "{}"),
        "several[].rate": ("number > 0, <= 1", "0.5"),
        "several[].free": ("mapping", "{}"),
    }


def test_sections_are_hashed_by_value():
    sections = [Inner(free={"a": 1}), Inner(free={"a": 1}), Inner(free={"a": 2})]
    assert len(set(sections)) == 2


def test_error_without_a_text():
    class Silent(Section):
        number: int = 1

        @field_validator("number")
        @classmethod
        def _refuse(cls, number: int) -> int:
            raise ValueError

    with pytest.raises(ConfigError, match=r"number: not valid \(got 2\)"):
        validate(Silent, {"number": 2})
