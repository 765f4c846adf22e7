"""torch's own attention on flashtile."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashtile.integrations.sdpa import Handle


def use_as_sdpa(*, strict: bool = False) -> "Handle":
    """Puts flashtile behind ``torch.nn.functional.scaled_dot_product_attention``.

    Models that call it, and ``torch.nn.attention.varlen.varlen_attn``, run on flashtile unchanged:
    in all threads of the process, eagerly and in graphs of ``torch.compile``. It is a call, whose
    handle restores torch's kernels, and a context manager::

        handle = flashtile.use_as_sdpa()
        ...
        handle.remove()

        with flashtile.use_as_sdpa() as handle:
            ...

    On the CPU all layouts ``(batch, heads, seqlen, head_dim)`` of float16, bfloat16, float32 and
    float64 are computed by flashtile: with ``is_causal``, whose mask is aligned at the top left as
    torch defines it, with ``enable_gqa``, which expands no head in memory, with masks of bool and
    of numbers, and, outside of compiled graphs, with dropout, gradients of the mask and a head_dim
    of value of its own. On CUDA it computes what torch gives to its flash attention.

    Args:
        strict: What flashtile refuses raises. False: it is passed on to torch's own attention, with
            a warning for each reason, and counted.

    Returns:
        A handle. ``counts`` has the calls since it was made: ``served`` and ``served_backward`` by
        flashtile, and ``passed_on``, a dictionary from the sentence that says why to the number.
        ``remove()``, or the end of the ``with`` block, takes it away. Several may be active: each
        counts for itself, one that is strict makes all calls strict, and torch's kernels are back
        when the last is gone.

    Differentiable:
        As ``scaled_dot_product_attention``: query, key, value and a mask of numbers, once.

    Raises:
        TypeError: strict is not a bool.
        RuntimeError: torch's registry has another flash attention active, or this torch's ops are
            not those that are overridden; the sentence says which versions were tested. A call that
            flashtile refuses, where strict.
    """
    from flashtile.integrations import sdpa  # noqa: PLC0415  only when asked

    return sdpa.activate(strict=strict)
