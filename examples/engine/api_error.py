"""Errors as OpenAI's clients expect them: a status and an object with one sentence."""

from __future__ import annotations

import json
from typing import Any

LONGEST_QUOTE = 100  # characters of a value that a sentence shows


class ApiError(Exception):
    """What a request is answered with instead of a completion."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        elif self.status >= 500:
            kind = "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """When to come again, and whether the connection is still good for that."""
        if self.status in (429, 503):
            return {"retry-after": "1"}
        # The rest of such a body may never come: it must not be taken for the next request.
        return {"connection": "close"} if self.status in (408, 413) else {}


def show(value: Any) -> str:
    """A value of a request as a sentence quotes it."""
    if isinstance(value, list) and len(value) > LONGEST_QUOTE:
        value = value[:LONGEST_QUOTE]  # enough to fill the quotation
    elif isinstance(value, str):
        value = value[: LONGEST_QUOTE + 1]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_QUOTE else text[:LONGEST_QUOTE] + "..."
