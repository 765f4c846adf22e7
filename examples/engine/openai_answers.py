"""How an answer is written down: as a completion or as a chat, whole or in chunks."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from api_error import ApiError
from openai_requests import ChatBody, CommonBody


@dataclass
class Piece:
    """Text of one or several tokens; the last one of an answer says why it ended."""

    text: str
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, int] | None = None


def event(data: dict[str, Any]) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(data)}\n\n"


def error_event(error: ApiError) -> str:
    """The last event of a stream that cannot go on."""
    return event(error.body())


@dataclass
class Answer:
    """The answer to one request."""

    body: CommonBody
    created: int = field(default_factory=lambda: int(time.time()))
    name: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The response without streaming."""
        last = pieces[-1]
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        piece = Piece(text, tokens, last.finish_reason)
        kind = "chat.completion" if self.chat else "text_completion"
        content = {"message": {"role": "assistant", "content": text}}
        choice = content if self.chat else {"text": text}
        return {**self._frame(kind), "choices": [self._choice(choice, piece)], "usage": last.usage}

    def chunk(self, piece: Piece) -> str:
        """One event of a stream."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        delta = {"delta": {"role": "assistant", "content": piece.text}}
        choice = delta if self.chat else {"text": piece.text}
        return event({**self._frame(kind), "choices": [self._choice(choice, piece)]})

    def end(self, usage: dict[str, int] | None) -> str:
        """The last events of a stream."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        asked = self.body.stream_options.include_usage
        last = {**self._frame(kind), "choices": [], "usage": usage}
        return (event(last) if asked else "") + "data: [DONE]\n\n"

    @property
    def chat(self) -> bool:
        """Whether it is a chat's."""
        return isinstance(self.body, ChatBody)

    def _frame(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.name}",
            "object": kind,
            "created": self.created,
            "model": self.body.model,
        }

    def _choice(self, content: dict[str, Any], piece: Piece) -> dict[str, Any]:
        ids = {"token_ids": piece.tokens} if self.body.return_token_ids else {}
        return {
            "index": 0,
            "finish_reason": piece.finish_reason,
            "logprobs": None,
            **content,
            **ids,
        }
