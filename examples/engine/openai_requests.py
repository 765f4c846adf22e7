"""OpenAI's requests, as far as they are served.

null means that a field is absent. Fields of OpenAI's that are not served are accepted with the
value that asks for nothing, and refused by their name with every other one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from api_error import ApiError, show
from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

MOST_STOPS = 16
LONGEST_STOP = 1024  # characters

# Numbers that JSON lines can carry: the engine cannot say whose a line was that it could not read.
Finite = Annotated[float, Field(allow_inf_nan=False)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def refuse(name: str, value: Any, allowed: str) -> ApiError:
    """What a field with a wrong value is refused with."""
    return ApiError(400, f"{name} is {show(value)}; allowed: {allowed}", param=name)


def is_equal(value: Any, other: Any) -> bool:
    """Equal as JSON: 0 is 0.0, but not false."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


class Fields(BaseModel):
    """An object of a request. `neutral`: fields that are not served, with what they may say."""

    model_config = ConfigDict(extra="forbid")
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        served = {}
        for name, value in data.items():
            if value is None:
                continue
            if name not in cls.neutral:
                served[name] = value
                continue
            allowed = cls.neutral[name]
            if not any(is_equal(value, one) for one in allowed):
                said = ", ".join(["null", *(show(one) for one in allowed)])
                raise refuse(name, value, f"{said}, as it is not served")
        return served


class StreamOptions(Fields):
    neutral: ClassVar = {"include_obfuscation": (False,)}
    include_usage: bool = False


class CommonBody(Fields):
    """Fields of both kinds of request, named as OpenAI names them."""

    model: str
    temperature: Finite = 1.0
    top_p: Finite = 1.0
    seed: Int64 | None = None
    stop: list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = (
        False  # not OpenAI's: every choice then has the token_ids it stands for
    )
    # They name the client; no answer depends on them.
    user: str = ""
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    metadata: dict[str, str] = Field(default_factory=dict)

    @field_validator("stop", mode="before")
    @classmethod
    def _list_of_stops(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or len(stops) > MOST_STOPS:
            raise refuse("stop", value, f"a string, or a list of at most {MOST_STOPS}")
        for stop in stops:
            if not isinstance(stop, str) or len(stop) > LONGEST_STOP:
                raise refuse("stop", stop, f"strings of at most {LONGEST_STOP} characters")
        return stops

    def most_tokens(self) -> int:
        """How many tokens the answer may have."""
        raise NotImplementedError


NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "service_tier": ("auto", "default"),
    "store": (False,),
}


class CompletionBody(CommonBody):
    neutral: ClassVar = {
        **NEUTRAL,
        "best_of": (1,),
        "echo": (False,),
        "logprobs": (),
        "suffix": ("",),
    }
    prompt: str | list[int]
    max_tokens: Int64 = 16

    @field_validator("prompt", mode="plain")
    @classmethod
    def _one_prompt(cls, value: Any) -> str | list[int]:
        prompt = value
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
            (prompt,) = value
        if isinstance(prompt, str):
            return prompt
        if isinstance(prompt, list) and all(type(token) is int for token in prompt):
            wrong = next((token for token in prompt if not 0 <= token < 2**31), None)
            if wrong is not None:
                raise ApiError(400, f"prompt has {wrong}; allowed: tokens", param="prompt")
            return prompt
        raise refuse("prompt", value, "one text, or one list of tokens")

    def most_tokens(self) -> int:
        return self.max_tokens


class Message(Fields):
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **dict.fromkeys(("name", "refusal", "audio", "function_call", "tool_call_id"), ()),
        "tool_calls": ([],),
        "annotations": ([],),
    }
    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="plain")
    @classmethod
    def _text(cls, value: Any) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise refuse("content", value, "a string, or a list of parts of type text")
        texts = []
        for part in value:
            text = part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str) or part != {"type": "text", "text": text}:
                raise refuse("content", part, "strings, and parts of type text")
            texts.append(text)
        return "".join(texts)


class ChatBody(CommonBody):
    neutral: ClassVar = {
        **NEUTRAL,
        "logprobs": (False,),
        "top_logprobs": (0,),
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),  # of no tools
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    max_tokens: Int64 = 256
    max_completion_tokens: Int64 | None = None

    def most_tokens(self) -> int:
        most = self.max_completion_tokens
        return self.max_tokens if most is None else most

    def conversation(self) -> list[dict[str, str]]:
        """The messages as a chat template knows them: developer is OpenAI's newer word."""
        roles = {"developer": "system"}
        return [{"role": roles.get(m.role, m.role), "content": m.content} for m in self.messages]


Body = TypeVar("Body", bound=CommonBody)


def parse(kind: type[Body], data: bytes) -> Body:
    """The request of an HTTP body; ApiError when it is none."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        raise ApiError(400, f"the body is no JSON: {first['ctx']['error']}")
    if first["type"] == "missing":
        raise ApiError(400, f"{where} is missing", param=where)
    if first["type"] == "extra_forbidden":
        raise ApiError(400, f"there is no field {show(where)}", param=where[:100])
    if not where:
        raise ApiError(400, "the body is no JSON object")
    message = f"{where} is {show(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}"
    raise ApiError(400, message, param=where)
