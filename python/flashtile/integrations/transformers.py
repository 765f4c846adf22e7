"""flashtile as an attention of Hugging Face transformers: as right as "eager", or refused by name.

    import flashtile.integrations.transformers

    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="tiled")

The import registers two names, each with an attention function, which runs in every layer, and a
mask function, which runs once per forward pass and kind of layer. An attention without a mask
function of its own gets no mask at all: padding, windows and the empty rows of a static cache are
then forgotten in silence.

``"tiled"`` is for every model. ``"flashtile"`` has "flash" in it, by which transformers recognises
an attention of the flash-attn family. Continuous batching takes such names only, and vision towers
hand whole batches of images to them. transformers looks for a package behind such a name, so
flashtile answers in its place.

Served, forward and backward: causal, bidirectional and sliding-window attention, with padding on
either side or with sequences packed by position_ids or cu_seq_lens; cross attention; GQA; any
scaling; softcap, sinks, the position bias of T5, and dropout; chunked, prefix and other masks as a
boolean element for every query and key; a boolean or additive mask of four dimensions. Without
gradients also: padding on the left in front of a cache, static caches, and continuous batching
("flashtile" alone). A query that sees no key, such as padding in front of a causal sequence, gives
0; eager gives an average that has no meaning.

Refused with NotImplementedError: attention weights, dropout over a static cache, a position bias
over packed sequences, modules that compute attention by themselves (``replace_attention`` serves
those of BLOOM and MPT), and every keyword that is not known here.

torch.compile: a graph break where a rule with a window or packed sequences is read, and none where
generate() makes the masks ahead. Without attention_mask and cache transformers always reads
position_ids for packed sequences. Gaps in the padding end a compiled graph while it runs.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any, NoReturn

import transformers

from flashtile.integrations._host_names import check_names, missing_names

TILED, FLASHTILE = "tiled", "flashtile"  # what attn_implementation may be
OLDEST, NEWEST = "5.20.0", "5.24.0"  # the versions tested

__all__ = ["FLASHTILE", "TILED", "flashtile_attention", "flashtile_mask", "replace_attention"]

NEEDED: dict[str, tuple[str, ...]] = {
    "transformers": ("AttentionInterface", "AttentionMaskInterface"),
    "transformers.masking_utils": (
        "causal_mask_function",
        "sdpa_mask",
    ),
}
FLASH_UTILS = "transformers.modeling_flash_attention_utils"
FIND_PACKAGE = "_lazy_imports"  # there: the functions of the package that a name stands for


def tested() -> str:
    """Part of a sentence: this version and the tested ones."""
    return f"transformers {transformers.__version__} (tested: {OLDEST} to {NEWEST})"


def check_version() -> None:
    """Refuses a version of transformers that this module cannot plug into."""
    versions = (transformers.__version__, OLDEST)
    version, oldest = (tuple(int(n) for n in v.split(".")[:2]) for v in versions)
    if version < oldest:
        raise ImportError(f"{tested()} is older than what flashtile serves")
    check_names(tested(), NEEDED)


check_version()

from flashtile.integrations._transformers_alibi import replace_attention  # noqa: E402
from flashtile.integrations._transformers_attention import flashtile_attention  # noqa: E402
from flashtile.integrations._transformers_masks import flashtile_mask, refuse  # noqa: E402


def refuse_flash_attn(*_args: object, **_options: object) -> NoReturn:
    """In the place of the flash-attn functions that some models call by themselves."""
    refuse("a model that calls the functions of flash-attn by itself")


def answer_for_the_package() -> bool:
    """Whether transformers, asked for "flashtile", no longer looks for a package of that name."""
    if missing_names({FLASH_UTILS: (FIND_PACKAGE,)}):
        return False
    utils: Any = importlib.import_module(FLASH_UTILS)
    others = getattr(utils, FIND_PACKAGE)
    if getattr(others, "knows_flashtile", False):
        return True

    def find_package(implementation: str | None, *args: Any, **options: Any) -> Any:
        if implementation == FLASHTILE:
            return (refuse_flash_attn,) * 5
        return others(implementation, *args, **options)

    find_package.knows_flashtile = True  # type: ignore[attr-defined]
    setattr(utils, FIND_PACKAGE, find_package)
    return True


def register(name: str) -> None:
    """Both functions under a name that is not another's."""
    for interface, function in (
        (transformers.AttentionInterface, flashtile_attention),
        (transformers.AttentionMaskInterface, flashtile_mask),
    ):
        known = interface()
        other = known[name] if name in known else function  # noqa: SIM401, no dict
        if not other.__module__.startswith("flashtile."):
            where = f"{other.__module__}.{other.__qualname__}"
            raise ImportError(f"{interface.__name__} has another {name!r}, from {where}")
        interface.register(name, function)


register(TILED)
if answer_for_the_package():
    register(FLASHTILE)
else:
    warnings.warn(
        f"{tested()} has no {FLASH_UTILS}.{FIND_PACKAGE}, so that the name {FLASHTILE!r} does not"
        f" work; {TILED!r} does",
        stacklevel=2,
    )
