"""flashtile as an attention backend of SGLang: ``--attention-backend flashtile``.

SGLang calls :func:`register` in each of its processes, as the entry point ``flashtile`` of the
group ``sglang.srt.plugins``. That adds a name to choose and changes nothing else.

**It has not been run**: SGLang's packages need a GPU to be imported. What it calls was compared
with the sources of the version in ``TESTED``; its arithmetic is tested over stand-ins.

Served: decoding, also in CUDA graphs, and prefill in parts; GQA, windows, softcap, sinks, a
head_dim of the values of its own; any page size.

Refused by a sentence: MLA, encoders and encoder-decoder models, speculative decoding, diffusion
models, context parallelism, a cache of another type than the model (fp8 and the like), a memory
pool of its own for windows (``--disable-hybrid-swa-memory`` serves such models), local attention
(Llama 4), Grok's temperature, several items in one prompt, an LSE as a result, CUDA graphs of
prefill, and every keyword that is not known here.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import Any, NoReturn

from flashtile.integrations import _host_names

__all__ = ["Counts", "counts", "register"]

NAME = "flashtile"
TESTED = "0.5.23"  # the only version whose sources were read
REGISTRY = "sglang.srt.layers.attention.attention_registry"
CHOICES = "sglang.srt.arg_groups.choices"
NEEDED: dict[str, tuple[str, ...]] = {
    REGISTRY: ("ATTENTION_BACKENDS", "register_attention_backend"),
    CHOICES: ("ATTENTION_BACKEND_CHOICES", "add_attention_backend_choices"),
}

logger = logging.getLogger(__name__)


@dataclass
class Counts:
    """What flashtile has computed in this process."""

    served: int = 0  # calls, one for each layer and step; replays of a CUDA graph are not calls


counts = Counts()


def tested() -> str:
    """Part of a sentence: this version and the tested one."""
    try:
        version = importlib.import_module("sglang").__version__
    except ImportError as error:
        raise ImportError(
            f"sglang cannot be imported ({error}); flashtile.integrations.sglang is called by "
            f"SGLang (sources compared: {TESTED})"
        ) from error
    return f"sglang {version} (sources compared: {TESTED})"


def check_names(names: dict[str, tuple[str, ...]]) -> None:
    """Refuses a SGLang that this module cannot plug into."""
    _host_names.check_names(tested(), names)


def refuse(what: str, allowed: str) -> NoReturn:
    """Says what SGLang asks for, and that it is not served."""
    raise NotImplementedError(f"{what}; flashtile's backend for SGLang allows {allowed}")


def create(runner: Any) -> Any:
    """The backend of a model runner."""
    backend = importlib.import_module(f"{__package__}._sglang_backend")
    return backend.Backend(runner)


def register() -> None:
    """Makes ``flashtile`` one of the names that ``--attention-backend`` takes.

    Called twice, it does nothing the second time.

    Raises:
        ImportError: This SGLang has moved a name that flashtile needs. SGLang logs it.
        RuntimeError: Another plug-in has taken the name.
    """
    check_names(NEEDED)
    registry, choices = importlib.import_module(REGISTRY), importlib.import_module(CHOICES)
    known = registry.ATTENTION_BACKENDS.get(NAME, create)
    if known is not create:
        raise RuntimeError(f"SGLang has another backend {NAME!r}, from {known.__module__}")
    registry.register_attention_backend(NAME)(create)
    if NAME not in choices.ATTENTION_BACKEND_CHOICES:
        choices.add_attention_backend_choices([NAME])
        logger.info("flashtile is the attention backend %r", NAME)
