"""Text of examples/engine/serve.py from tokens that are bytes."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "engine"))
from text_stream import TextStream


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    @staticmethod
    def decode(tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(tokens).decode("utf-8", errors="replace")


def pieces_of(data: bytes, *stops: str) -> list[str]:
    stream = TextStream(Bytes(), stops)
    result = []
    for byte in data:
        result.append(stream.push(byte))
        if stream.stopped:
            break
    return [*result, stream.end()]


def test_a_character_of_several_bytes_comes_whole() -> None:
    assert pieces_of("aé€😀b".encode()) == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_half_a_character_at_the_end_is_not_lost() -> None:
    assert "".join(pieces_of("a€".encode()[:-1])) == "a\ufffd"


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["llo w"], "he"),
        (["o", "ell"], "h"),
        (["world!", "x"], "hello world"),
        ([""], "hello world"),
        (["hello world"], ""),
        (["ld"], "hello wor"),
    ],
)
def test_text_ends_before_a_stop_string(stops: list[str], expected: str) -> None:
    pieces = pieces_of(b"hello world", *stops)
    assert "".join(pieces) == expected


def test_what_only_begins_like_a_stop_string_is_held_back_no_longer_than_needed() -> None:
    assert pieces_of(b"abac", "abad") == ["", "", "", "abac", ""]


def test_random_texts_agree_with_a_search_of_the_whole() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("ab€", k=rng.randrange(12)))
        stops = ["".join(rng.choices("ab€", k=rng.randint(1, 3))) for _ in range(rng.randrange(3))]
        # The stop string that is complete first ends the text, at its own beginning.
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        expected = text[: min(found)[1]] if found else text
        assert "".join(pieces_of(text.encode(), *stops)) == expected
