"""Text from tokens that come one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Turns tokens into text as soon as it cannot change any more, up to a stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._begin = 0  # tokens from here on are decoded, for the spaces between them
        self._shown = 0  # text of the tokens before has been taken
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token adds; "" while a character or a stop string is incomplete."""
        self._tokens.append(token)
        text = self._new_text()
        if text.endswith("\ufffd"):  # a part of a character of several bytes
            return ""
        self._begin, self._shown = self._shown, len(self._tokens)
        return self._until_stop(text)

    def end(self) -> str:
        """What was held back, when no further token comes."""
        text = self._until_stop(self._new_text())
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _decode(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self._tokens[begin:end], skip_special_tokens=True))

    def _new_text(self) -> str:
        before = self._decode(self._begin, self._shown)
        return self._decode(self._begin, len(self._tokens))[len(before) :]

    def _until_stop(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        held = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Characters at the end of the text that the stop string begins with."""
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
