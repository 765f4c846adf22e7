"""An option is written once: schemas, keywords, signatures and checks list the same ones."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashtile
from flashtile import _options, _scores
from flashtile._options import CacheArguments, Options, Scores, Sequences

ATTENTION = (*Options._fields, *Sequences._fields, *Scores._fields)
CACHE = (*Options._fields, *CacheArguments._fields, *Scores._fields)
WANTED = tuple(f"wants_{name}" for name in _scores.DIFFERENTIABLE)
DEFAULTS = {
    **Options._field_defaults,
    **Sequences._field_defaults,
    **CacheArguments._field_defaults,
    **Scores._field_defaults,
    **dict.fromkeys(("max_logit", *WANTED), False),
}
OPS = {
    "forward": ATTENTION,
    "forward_out": ATTENTION,
    "forward_max_logit": ATTENTION,
    "forward_max_logit_out": ATTENTION,
    "backward": ATTENTION,
    "backward_scores": (*ATTENTION, *WANTED),
    "can_run": (*ATTENTION, "max_logit", *WANTED),
    "forward_kvcache": CACHE,
    "forward_kvcache_out": CACHE,
    "can_run_kvcache": CACHE,
}


@pytest.mark.parametrize(("name", "fields"), OPS.items(), ids=OPS.keys())
def test_schemas_end_with_the_lists(name: str, fields: tuple[str, ...]) -> None:
    arguments = getattr(torch.ops.flashtile, name).default._schema.arguments[-len(fields) :]
    assert tuple(argument.name for argument in arguments) == fields
    required = ("softmax_scale", "window_left", "window_right")
    for argument in arguments:
        assert argument.has_default_value() == (argument.name not in required)
        if argument.has_default_value():
            assert argument.default_value == DEFAULTS[argument.name]


RETURNED = {"return_lse", "return_max_logit"}
FUNCTIONS: list[tuple[Callable[..., Any], frozenset[str], set[str]]] = [
    (flashtile.attention, _options.AttentionOptions.__optional_keys__, RETURNED),
    (flashtile.attention_varlen, _options.VarlenOptions.__optional_keys__, RETURNED),
    (flashtile.attention_with_kvcache, _options.KVCacheOptions.__optional_keys__, {"return_lse"}),
    (flashtile.append_kv, _options.AppendOptions.__optional_keys__, {"cache_seqlens", "q"}),
]


@pytest.mark.parametrize(("function", "typed", "more"), FUNCTIONS, ids=lambda f: f)
def test_signatures_and_docstrings_have_the_keywords(
    function: Callable[..., Any], typed: frozenset[str], more: set[str]
) -> None:
    parameters = inspect.signature(function).parameters.values()
    keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords == typed | more
    described = inspect.getdoc(function) or ""
    assert all(f"\n    {parameter.name}: " in described for parameter in parameters)


def test_options_have_the_defaults_of_the_functions() -> None:
    for function in (flashtile.attention, flashtile.attention_varlen):
        given = inspect.signature(function).parameters
        for name, parameter in inspect.signature(_options.checked_options).parameters.items():
            assert parameter.default == given[name].default
        for name, parameter in inspect.signature(_scores.checked_scores).parameters.items():
            assert parameter.default == given[name].default
    assert _options.checked_options() == Options()
    assert _scores.checked_scores() is None


def test_can_run_knows_the_keywords_of_the_calls() -> None:
    q = torch.zeros(1, 3, 4, 8)
    sentence = r"^causel is no keyword; allowed: those of attention and attention_varlen$"
    with pytest.raises(TypeError, match=sentence):
        flashtile.can_run(q, q, q, causel=True)  # type: ignore[call-arg]
