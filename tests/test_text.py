"""Text from files cannot move the cursor, change colours, reverse what is read or flood the terminal."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from repmlp_deploy.text import LONGEST, escape_document, first_fault, first_line, kind_and_line, printable


@pytest.mark.parametrize("odd", ["\x1b[2J", "\x07", "\x9b31m", "\u202e", "\u2066", "\u200b", "\ufeff", "\ud800"])
def test_unsafe_characters_become_escapes(odd: str) -> None:
    said = printable(f"a{odd}b")
    assert odd[0] not in said
    assert said.startswith("a\\")
    said.encode("utf-8")


def test_the_first_fault_has_its_place_and_its_message() -> None:
    class Given(BaseModel):
        sizes: list[int]

    with pytest.raises(ValidationError) as caught:
        Given.model_validate({"sizes": [1, "many", None]})
    where, said = first_fault(caught.value)
    assert where == "sizes.1"
    assert said.startswith("Input should be a valid integer")


def test_line_breaks_become_spaces_and_long_text_is_cut() -> None:
    assert printable("a\n\n  b\t c") == "a b c"
    long = printable("x" * (LONGEST + 1))
    assert len(long) < LONGEST + 40
    assert long.endswith("(2,001 characters)")


def test_ordinary_text_of_any_script_stays() -> None:
    assert printable("résumé 重み вес") == "résumé 重み вес"


def test_a_document_keeps_its_lines_and_nothing_unsafe() -> None:
    assert escape_document("a\x1b[2J\n\u202eb\n") == "a\\u001b[2J\n\\u202eb\n"


@pytest.mark.parametrize(
    ("error", "line", "with_kind"),
    [
        (RuntimeError("no GPU\nCUDA_VISIBLE_DEVICES is empty"), "no GPU", "RuntimeError: no GPU"),
        (KeyError("a"), "'a'", "KeyError: 'a'"),
        (AssertionError(), "AssertionError", "AssertionError"),
        (ValueError("\n  indented\n"), "indented", "ValueError: indented"),
    ],
)
def test_an_exception_is_told_in_one_line(error: Exception, line: str, with_kind: str) -> None:
    assert first_line(error) == line
    assert kind_and_line(error) == with_kind
