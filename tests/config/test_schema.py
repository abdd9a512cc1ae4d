"""Typed settings: strings and TOML to values, and back."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.config.naming import options_were_typed
from minimind.config.schema import (
    FieldInfo,
    parse_values,
    range_problems,
    read_toml,
    schema_of,
    suggestion,
    write_toml,
)
from minimind.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Example:
    """Example"""

    count: Annotated[int, FieldInfo("A count.", minimum=1)] = 8
    rate: Annotated[float, FieldInfo("A rate.", above=0.0, below=1.0)] = 0.5
    switch: Annotated[bool, FieldInfo("A switch.")] = True
    limit: Annotated[int | None, FieldInfo("A limit.", default_text="no limit")] = None
    kind: Annotated[Literal["round", "square"], FieldInfo("A kind.", synonyms=(("ball", "round"),))] = "round"
    names: Annotated[tuple[str, ...], FieldInfo("Names.")] = ()
    title: Annotated[str | None, FieldInfo("A title.")] = None
    size: Annotated[int | Literal["auto"], FieldInfo("A size.", minimum=1)] = 4


def test_a_declaration_is_parsed() -> None:
    settings = schema_of(Example)
    assert list(settings) == ["count", "rate", "switch", "limit", "kind", "names", "title", "size"]
    assert (settings["limit"].kind, settings["limit"].optional, settings["limit"].default_text) == (
        int,
        True,
        "no limit",
    )
    assert settings["names"].repeatable
    assert settings["kind"].metavar == "round|square"
    assert (settings["size"].kind, settings["size"].optional) == (int, False)
    assert settings["size"].metavar == "INTEGER|auto"
    assert settings["rate"].range_text == "above 0 and below 1"
    assert settings["limit"].range_text == "at least 1", "the default of whole numbers"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("count", "12", 12),
        ("count", "1e9", 10**9),
        ("rate", "5e-4", 0.0005),
        ("switch", "False", False),
        ("switch", "1", True),
        ("limit", "3", 3),
        ("kind", "ball", "round"),
        ("names", "a", ("a",)),
        ("names", ["a", "b"], ("a", "b")),
        ("title", "7", "7"),
        ("size", "auto", "auto"),
        ("size", "12", 12),
    ],
)
def test_text_becomes_the_type_of_its_field(name: str, text: object, value: object) -> None:
    parsed, problems = parse_values(Example, {name: text})
    assert (parsed, problems) == ({name: value}, [])
    assert type(parsed[name]) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("count", "abc", "--count abc is not a whole number; write for example 8."),
        ("count", "1.5", "--count 1.5 is not a whole number; write for example 8."),
        ("count", True, "--count True is not a whole number; write for example 8."),
        ("count", "0", "--count 0 is out of range; it must be at least 1."),
        ("rate", "1", "--rate 1.0 is out of range; it must be above 0 and below 1."),
        ("rate", "nan", "--rate nan is not a finite number; write for example 0.5."),
        ("rate", 10**400, "--rate is too large; write for example 0.5."),
        ("count", 10**400, "--count is too large; write for example 8."),
        ("count", "9" * 20, "--count is too large; write for example 8."),
        ("count", "inf", "--count inf is not a whole number; write for example 8."),
        ("switch", "maybe", "--switch maybe is not true or false; write for example true."),
        ("kind", "oval", "--kind oval is not known; choose round or square."),
        ("size", "large", "--size large is not a whole number; write for example 4 or auto."),
        ("size", "0", "--size 0 is out of range; it must be at least 1."),
        ("size", None, "--size None is not a whole number; write for example 4 or auto."),
        ("title", 7, "--title 7 is not text; write text in quotes."),
        (
            "title",
            "a\udcff",
            "--title is not valid UTF-8; write it, or name the file, in UTF-8.",
        ),
    ],
)
def test_a_wrong_value_names_its_option_and_the_fix(name: str, given: object, sentence: str) -> None:
    with options_were_typed():
        assert parse_values(Example, {name: given}) == ({}, [sentence])


def test_all_wrong_values_are_reported_at_once_with_their_file() -> None:
    with options_were_typed():
        _, problems = parse_values(
            Example, {"count": 0, "rate": 2.0, "titel": "x", "model": {"a": 1}}, "run.toml"
        )
    assert problems == [
        "run.toml: --count 0 is out of range; it must be at least 1.",
        "run.toml: --rate 2.0 is out of range; it must be above 0 and below 1.",
        "run.toml: unknown key 'titel'; did you mean 'title'?",
        "run.toml: unknown key 'model'; write its keys without a table header.",
    ]


def test_values_given_from_python_are_checked_too() -> None:
    assert [*range_problems(Example(rate=0))] == [  # a whole number is a number
        "rate=0 is out of range; it must be above 0 and below 1."
    ]
    assert [*range_problems(Example(names="abc"))] == [  # type: ignore[arg-type]
        "names='abc' is not a tuple; write ('abc',)."
    ]
    assert [*range_problems(Example(count="8"))] != []  # type: ignore[arg-type]
    assert [*range_problems(Example())] == []


def test_a_suggestion_ends_the_sentence_once() -> None:
    assert suggestion("batchsize", ["batch_size"]) == "; did you mean 'batch_size'?"
    assert suggestion("zzz", ["batch_size"]) == "."


@given(
    st.builds(
        Example,
        count=st.integers(1, 2**63 - 1),
        rate=st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True),
        switch=st.booleans(),
        limit=st.none() | st.integers(1, 2**63 - 1),
        kind=st.sampled_from(["round", "square"]),
        names=st.lists(st.text(st.characters(codec="utf-8"))).map(tuple),
        title=st.none() | st.text(st.characters(codec="utf-8")),
        size=st.just("auto") | st.integers(1, 2**63 - 1),
    )
)
def test_settings_survive_toml(settings: Example) -> None:
    parsed, problems = parse_values(Example, tomllib.loads(write_toml(settings, [Example])))
    assert problems == []
    assert Example(**parsed) == settings


def test_an_unset_value_is_written_as_a_comment() -> None:
    text = write_toml(Example(), [Example])
    assert "# limit: no limit\n" in text
    assert text.startswith("# Example\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"count = = 3", "is not valid TOML"),
        (b"title = '\xff'", "is not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_toml(path)
    assert f"--config {path}" in str(caught.value)
    assert message in str(caught.value)


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Paths"""

    file: Annotated[str | None, FieldInfo("A file.", metavar="PATH")] = None
    files: Annotated[tuple[str, ...], FieldInfo("Files.", metavar="PATH")] = ()
    name: Annotated[str, FieldInfo("A name.")] = "x"


def test_a_home_folder_is_expanded_in_paths_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    values = {"file": "~/a", "files": ["~", "b~"], "name": "~/a"}
    parsed, problems = parse_values(Paths, values)
    assert (parsed, problems) == (
        {"file": "/home/me/a", "files": ("/home/me", "b~"), "name": "~/a"},
        [],
    )


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("", "--file is empty; give a path."),
        ("a\0b", "--file contains a NUL character; give a path without it."),
        (
            "~no-such-user/x",
            "--file ~no-such-user/x is not the home folder of a user; write it in full, or as "
            "./~no-such-user/x if ~ is in the name.",
        ),
    ],
)
def test_a_path_that_cannot_be_meant_is_refused(path: str, sentence: str) -> None:
    with options_were_typed():
        assert parse_values(Paths, {"file": path}) == ({}, [sentence])


@pytest.mark.parametrize("content", [b"\xef\xbb\xbftitle = 'a'\n", b"title = 'a'\n"])
def test_a_byte_order_mark_of_an_editor_is_accepted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.toml").write_bytes(content)
    assert read_toml(tmp_path / "run.toml") == {"title": "a"}


def test_a_whole_number_may_be_written_as_a_float() -> None:
    assert parse_values(Example, {"count": 1e9}) == ({"count": 10**9}, [])
    assert parse_values(Example, {"count": 1.5}) == (
        {},
        ["count=1.5 is not a whole number; write for example 8."],
    )
