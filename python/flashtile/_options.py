"""How to attend: the options as callers write them, and the arguments that the ops take.

An option stands here three times: as a keyword for type checkers, as a field of `Options`, and in
`checked_options`, which turns the first into the second. The functions of the package add it to
their signatures and docstrings.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

from torch import Tensor

from flashtile import _checks

UNLIMITED = -1  # window_left, window_right: no bound on this side (FLASHTILE_UNLIMITED)

Alignment: TypeAlias = Literal["bottom_right", "top_left"]
Biases: TypeAlias = Tensor | Sequence[Tensor] | None


class CommonOptions(TypedDict, total=False):
    """Keywords of every attention, as type checkers see them, without what is to be returned."""

    causal: bool
    causal_alignment: Alignment
    window_size: tuple[int, int]
    softmax_scale: float | None
    out: Tensor | None
    softcap: float
    alibi_slopes: Tensor | None
    bias: Biases
    mask: Tensor | None
    sink: Tensor | None
    query_scale: Tensor | None


class AttentionOptions(CommonOptions, total=False):
    """Keywords of :func:`attention`."""

    deterministic: bool
    dropout_p: float
    rng_state: Tensor | None


class VarlenOptions(AttentionOptions, total=False):
    """Keywords of :func:`attention_varlen`."""

    seqused_q: Tensor | None
    seqused_k: Tensor | None
    check: bool


class _PlaceOptions(TypedDict, total=False):
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_interleaved: bool
    cache_batch_idx: Tensor | None
    block_table: Tensor | None
    cu_seqlens_q: Tensor | None
    check: bool


class AppendOptions(_PlaceOptions, total=False):
    """Keywords of :func:`append_kv`, without q and cache_seqlens."""

    rotary_q_fixed: bool


class KVCacheOptions(CommonOptions, _PlaceOptions, total=False):
    """Keywords of :func:`attention_with_kvcache`."""

    k: Tensor | None
    v: Tensor | None
    cache_seqlens: Tensor | int | None
    cache_leftpad: Tensor | None
    max_seqlen_q: int | Tensor | None
    num_splits: int


def check_keywords(given: Iterable[str], known: frozenset[str], functions: str) -> None:
    """TypeError if a keyword is not among those of the functions."""
    for name in given:
        if name not in known:
            raise TypeError(f"{name} is no keyword; allowed: those of {functions}")


class Options(NamedTuple):
    """What every op takes behind its tensors, in the order of kernel/torch/options.h."""

    softmax_scale: float | None = None
    window_left: int = UNLIMITED
    window_right: int = UNLIMITED
    deterministic: bool = False
    alignment: int = 0  # flashtile_alignment


def checked_options(
    causal: object = False,
    causal_alignment: object = "bottom_right",
    window_size: object = _checks.NO_WINDOW,
    softmax_scale: object = None,
    deterministic: object = False,
) -> Options:
    """What callers give as options; or TypeError or ValueError."""
    causal = _checks.flag("causal", causal)
    deterministic = _checks.flag("deterministic", deterministic)
    scale = _checks.number("softmax_scale", softmax_scale)
    left, right = _checks.window(window_size)
    alignment = _checks.alignment("causal_alignment", causal_alignment)
    return Options(scale, left, 0 if causal else right, deterministic, alignment)


class Sequences(NamedTuple):
    """What attention's ops take behind the options; without cu_seqlens they are dense."""

    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The part that is tensors, or may be."""
        return self[2:]

    def batch(self, q: Tensor) -> int:
        """The number of sequences in q."""
        return q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1


class CacheArguments(NamedTuple):
    """What the ops that read a cache take behind the options."""

    num_splits: int = 0
    max_seqlen_q: int = 0
    cu_seqlens_q: Tensor | None = None
    rows_new: int = 0  # appended before: to every sequence; with cu_seqlens_new in all
    cu_seqlens_new: Tensor | None = None
    cache_seqlens: Tensor | None = None  # without the new rows
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    block_table: Tensor | None = None
    check: bool = False


class Scores(NamedTuple):
    """What every op takes at the end, in the order of kernel/torch/scores.h."""

    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    bias2: Tensor | None = None
    mask: Tensor | None = None
    sink: Tensor | None = None
    dropout_p: float = 0.0
    rng_state: Tensor | None = None
    query_scale: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that are given, by name."""
        return {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}


_COUNT = len(Options._fields)
_COUNT_ATTENTION = _COUNT + len(Sequences._fields)
_COUNT_CACHE = _COUNT + len(CacheArguments._fields)
REST = (*Options._fields, *Sequences._fields, *Scores._fields)  # of attention, behind q, k and v


def of_attention(arguments: tuple[Any, ...]) -> tuple[Options, Sequences, Scores]:
    """An op's arguments behind its tensors, of which torch leaves out defaults at the end."""
    return (
        Options(*arguments[:_COUNT]),
        Sequences(*arguments[_COUNT:_COUNT_ATTENTION]),
        Scores(*arguments[_COUNT_ATTENTION : len(REST)]),
    )


def of_cache(arguments: tuple[Any, ...]) -> tuple[Options, CacheArguments, Scores]:
    """The same for the ops that read a cache."""
    return (
        Options(*arguments[:_COUNT]),
        CacheArguments(*arguments[_COUNT:_COUNT_CACHE]),
        Scores(*arguments[_COUNT_CACHE:]),
    )
