"""Stop strings, against a search that looks at one character after the other."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostinato.errors import SamplingError
from ostinato.text import StopStrings


def _naive(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


SHORT = st.text(alphabet="ab\n", min_size=1, max_size=4)


@settings(max_examples=1000, deadline=None)
@given(pieces=st.lists(st.text(alphabet="ab\n", max_size=5), max_size=12), stops=st.lists(SHORT, max_size=4))
def test_as_a_naive_search_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    given_out, seen, stopped = "", "", False
    expected, expected_stop = _naive("".join(pieces), stops)
    for piece in pieces:
        text, stopped = matcher.feed(piece)
        given_out += text
        seen += piece
        assert expected.startswith(given_out), "text was given out that belongs to a stop string"
        if not stopped:
            held = seen[len(given_out) :]
            assert held == "" or any(stop.startswith(held) for stop in stops), "text is held back without need"
    given_out += matcher.flush()
    assert (given_out, stopped) == (expected, expected_stop)


def test_holds_back_and_gives_out() -> None:
    matcher = StopStrings(["</answer>", "STOP"])
    assert matcher.feed("yes </ans") == ("yes ", False)
    assert matcher.feed("ible> S") == ("</ansible> ", False)
    assert matcher.feed("TO") == ("", False)
    assert matcher.feed("P and more") == ("", True)
    assert matcher.feed("never") == ("", True)
    assert matcher.flush() == ""


def test_nothing_to_stop_at() -> None:
    matcher = StopStrings([])
    assert matcher.feed("anything") == ("anything", False)
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(SamplingError, match="empty"):
        StopStrings(["a", ""])
