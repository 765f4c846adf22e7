"""Masks of transformers as what flashtile takes: a window, the rows of sequences, lengths.

transformers gives a mask as a rule, such as "no key behind the query, none 4096 or more in front of
it", once per forward pass and kind of layer. The mask function here turns it into a window and the
rows of every sequence. A rule that is no such thing (chunks, blocks, prefixes) becomes a boolean
mask with an element for every query and key, a gap in the padding one for every key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import masking_utils

FULL = (-1, -1)  # the window without bounds
REFUSAL = "flashtile's plug-in does not serve {}; use eager attention"


def refuse(what: str) -> NoReturn:
    """Raises the one sentence that says what is not served."""
    raise NotImplementedError(REFUSAL.format(what))


def holds(condition: Tensor, otherwise: str) -> bool:
    """Whether the condition does; a compiled graph relies on it and refuses when it runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, REFUSAL.format(otherwise))
        return True
    return bool(condition)


class Rule(NamedTuple):
    """Which keys a query sees: from `left` before its position to `right` after it; -1: all.

    With `sequences`, (batch, seqlen), only those keys that have the number of the query there.
    """

    left: int = -1
    right: int = -1
    sequences: Tensor | None = None


class Rows(NamedTuple):
    """The sequences that the rows of a batch are, for attention_varlen; int32."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_q: Tensor | None = None  # rows not in use give 0
    seqused_k: Tensor | None = None


class Cached(NamedTuple):
    """The rows of a cache in use and, of these, the padding in front; (batch,) int32."""

    cache_seqlens: Tensor
    cache_leftpad: Tensor | None


@dataclass(frozen=True)
class Mask:
    """What every layer gets as its attention_mask. Without `rows` and `cached` it is dense."""

    window: tuple[int, int] | None  # None: `seen` says everything
    q_length: int
    kv_length: int
    kv_used: int  # no query sees a key from this one on
    rows: Rows | None = None
    cached: Cached | None = None
    seen: Tensor | None = None  # bool, (batch, 1, q_length or 1, kv_used); False hides a key
    ndim: int = 4  # transformers asks whether this is a 2-d mask that says what is padding: no

    def contiguous(self) -> Mask:
        """What generate() asks of a mask that it makes ahead."""
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, _types: Any, _args: tuple[Any, ...] = (), _kwargs: Any = None
    ) -> NoReturn:
        """An attention that computes by itself, such as BLOOM's, would take it for a tensor."""
        name = getattr(func, "__name__", str(func)).strip("_")
        refuse(f"a model that computes with its mask (torch's {name})")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(REFUSAL.format(f"a model that computes with its mask (.{name})"))


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="the rule of a mask is read from the closure of its function"
)
def read_rule(mask: Callable[..., Any]) -> Rule | None:
    """The rule of a mask function, or None where Rule cannot say it.

    Those of transformers are known by their names.
    """
    if mask.__module__ != masking_utils.__name__:
        return None
    cells = (cell.cell_contents for cell in mask.__closure__ or ())
    bound: dict[str, Any] = dict(zip(mask.__code__.co_freevars, cells, strict=True))
    try:
        return named_rule(mask.__qualname__.partition(".")[0], bound)
    except KeyError:
        return None  # another release of transformers, with other names: the mask will be dense


def named_rule(name: str, bound: dict[str, Any]) -> Rule | None:
    """That of a mask function with these names in its closure."""
    rule = None
    if name == "causal_mask_function":
        rule = Rule(right=0)
    elif name == "bidirectional_mask_function":
        rule = Rule()
    elif name == "sliding_window_overlay":
        rule = Rule(left=bound["sliding_window"] - 1)
    elif name == "sliding_window_bidirectional_overlay":
        rule = Rule(bound["sliding_window"], bound["sliding_window"])
    elif name == "packed_sequence_mask_function":
        ids = bound["packed_sequence_mask"]
        rule = Rule(sequences=ids) if (ids.diff() >= 0).all() else None  # None: they lie in parts
    elif name == "remap_positions_for_packed_sequence":  # in a sequence positions rise as rows do
        rule = read_rule(bound["mask_function"])
    elif name == "and_masks":
        rule = intersection([read_rule(function) for function in bound["mask_functions"]])
    return rule


def intersection(rules: list[Rule | None]) -> Rule | None:
    """What all of them let a query see; None where Rule cannot say it."""
    known = [rule for rule in rules if rule is not None]
    packed = [rule.sequences for rule in known if rule.sequences is not None]
    if len(known) < len(rules) or len(packed) > 1:
        return None
    left, right = (
        min((side for side in sides if side != -1), default=-1)
        for sides in ([rule.left for rule in known], [rule.right for rule in known])
    )
    return Rule(left, right, *packed)


def packed_rows(sequences: Tensor) -> Rows | None:
    """Sequences that follow each other in every entry of the batch; None: each entry is one."""
    begins = torch.ones_like(sequences, dtype=torch.bool)
    begins[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
    cu_seqlens = F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel()).int()
    return Rows(cu_seqlens, cu_seqlens) if len(cu_seqlens) > len(sequences) + 1 else None


def padded_rows(
    first: Tensor, count: Tensor, q_length: int, kv_length: int, *, skip_q: bool
) -> Rows:
    """Entries whose keys first to first + count - 1 are no padding: two sequences for each.

    One is the padding in front, not in use; the other the rest, of which `count` keys are in use.
    skip_q: the queries in front are padding, too, so that query i stays beside key i.
    """
    entry = torch.arange(len(first), device=first.device)
    zero = torch.zeros_like(first)
    first_q = first if skip_q else zero

    def pairs(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack((a, b), 1).flatten().int()

    def offsets(length: int, first: Tensor) -> Tensor:
        begins = pairs(entry * length, entry * length + first)
        return F.pad(begins, (0, 1), value=len(first) * length)

    cu_seqlens = offsets(q_length, first_q), offsets(kv_length, first)
    return Rows(*cu_seqlens, pairs(zero, q_length - first_q), pairs(zero, count))


def with_padding(mask: Mask, visible: Tensor | None, begin: int | Tensor, in_use: Tensor) -> Mask:
    """The mask of keys that are padding, or of a static cache; begin is a tensor there."""
    is_static = isinstance(begin, Tensor)
    if visible is None:
        return replace(mask, cached=Cached(in_use, None))
    first, count = visible.int().argmax(1), visible.sum(1)
    key = torch.arange(mask.kv_used, device=visible.device)
    between = (key >= first[:, None]) & (key < (first + count)[:, None])
    seen = visible[:, None, None, :]
    whole = holds((between == visible).all(), "padding between the tokens of a sequence")
    if whole and not is_static and begin == 0:
        skip_q = mask.window != FULL
        rows = padded_rows(first, count, mask.q_length, mask.kv_used, skip_q=skip_q)
        return replace(mask, rows=rows, seen=seen)
    newest = begin + mask.q_length
    if whole and holds((first + count == newest).all(), "padding behind the newest key of a cache"):
        return replace(mask, cached=Cached(in_use, first.int()))
    return replace(mask, cached=Cached(in_use, None) if is_static else None, seen=seen)


def looks_ahead_over_a_cache(
    rule: Rule, offset: int | Tensor, q_length: int, kv_length: int
) -> bool:
    """Whether there is a window whose queries stand where flashtile does not put them."""
    if (rule.left, rule.right) == FULL or rule.right == 0:
        return False
    return isinstance(offset, Tensor) or offset + q_length != kv_length


def flashtile_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | Mask | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **_hints: object,
) -> Mask:
    """Query i stands at q_offset + i, key j at kv_offset + j.

    q_offset of a static cache is a tensor, for whose value nobody waits. attention_mask, (batch,
    positions) bool, is False for padding, and so is every position behind its end.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask
    is_plain = mask_function is masking_utils.causal_mask_function
    rule = Rule(right=0) if is_plain else read_rule(mask_function)
    offset = q_offset - kv_offset  # the key beside the first query
    if rule is not None and rule.sequences is not None:
        is_whole = rule.sequences.shape == (batch_size, q_length) and q_length == kv_length
        if is_whole and attention_mask is None and not q_offset:
            window = (rule.left, rule.right)
            return Mask(window, q_length, kv_length, kv_length, packed_rows(rule.sequences))
        rule = None
    if rule is None or looks_ahead_over_a_cache(rule, offset, q_length, kv_length):
        sizes = (batch_size, q_length, kv_length, q_offset, kv_offset)
        how = {"allow_is_causal_skip": False, "use_vmap": use_vmap, "device": device}
        seen = masking_utils.sdpa_mask(*sizes, mask_function, attention_mask, **how)
        return Mask(None, q_length, kv_length, kv_length, seen=seen)

    window = (rule.left, rule.right)
    begin = 0 if window == FULL else offset
    is_static = isinstance(begin, Tensor)
    kv_used = kv_length
    if rule.right == 0 and not isinstance(begin, Tensor):
        kv_used = begin + q_length
    if not 0 <= begin <= kv_used <= kv_length:
        refuse(f"queries {begin} to {kv_used - 1} over {kv_length} keys")

    visible = attention_mask
    if visible is not None:
        visible = F.pad(visible, (0, max(0, kv_offset + kv_used - visible.shape[1])))
        visible = visible[:, kv_offset : kv_offset + kv_used]
        if not is_static and not torch.compiler.is_compiling() and visible.all():
            visible = None
    mask = Mask(window, q_length, kv_length, kv_used)
    if visible is None and not is_static:
        return mask
    in_use = torch.as_tensor(begin + q_length, dtype=torch.int32, device=device)
    return with_padding(mask, visible, begin, in_use.repeat(batch_size))
