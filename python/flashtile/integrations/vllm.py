"""flashtile as an attention backend of vLLM's V1 engine.

vLLM calls :func:`register` in each of its processes, as the entry point ``flashtile`` of the group
``vllm.general_plugins``. What that changes is up to the user:

- On CUDA nothing, until a user asks for it: ``LLM(..., attention_config={"backend": "CUSTOM"})`` or
  ``--attention-backend CUSTOM``.
- On the CPU vLLM has one backend and ignores what users ask for, so flashtile takes the place of
  that one, ``CPU_ATTN``, where ``FLASHTILE_VLLM=1`` is in the environment or ``VLLM_PLUGINS`` names
  flashtile. ``FLASHTILE_VLLM=0`` says no to both.

A line in vLLM's log says so where a model runs on flashtile, and ``counts.served`` how many layers
flashtile has computed in this process.

Served: decoding, prefill in parts, and batches of both; encoders without a cache; GQA, windows,
softcap, sinks, ALiBi, a head_dim of the values of its own; layers that read another one's cache;
any block size and any order of the cache in memory. On the CPU float16, bfloat16 and float32.

Refused by a sentence: caches of another type than the model (fp8 and the like), encoder-decoder
models, R-SWA, images that see themselves, a causal flag for each request, context parallelism, KV
connectors, fused quantisation of the output, and ``VLLM_BATCH_INVARIANT``: the bits of a request do
not depend on its neighbours, but they do depend on how a prompt is cut into parts, and vLLM cuts by
what else there is to do.

Ignored, as no result depends on it: ``common_prefix_len`` and ``fast_build``.
"""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import dataclass
from typing import Any, NoReturn

from flashtile.integrations import _host_names

__all__ = ["Counts", "counts", "register"]

PLUGIN = "flashtile"  # the entry point
SWITCH = "FLASHTILE_VLLM"
TESTED = "0.32.0"  # the only version
REGISTRY = "vllm.v1.attention.backends.registry"
BACKENDS = f"{__package__}._vllm_backend"

NEEDED: dict[str, tuple[str, ...]] = {REGISTRY: ("AttentionBackendEnum", "register_backend")}

logger = logging.getLogger(f"vllm.{PLUGIN}")  # its lines go where those of "vllm" go


@dataclass
class Counts:
    """What flashtile has computed in this process."""

    served: int = 0  # calls, one for each layer and step


counts = Counts()


def tested() -> str:
    """Part of a sentence: this version and the tested one."""
    try:
        version = importlib.import_module("vllm").__version__
    except ImportError as error:
        raise ImportError(
            f"vllm cannot be imported ({error}); flashtile.integrations.vllm is called by vLLM "
            f"(tested: {TESTED})"
        ) from error
    return f"vllm {version} (tested: {TESTED})"


def check_names(names: dict[str, tuple[str, ...]]) -> None:
    """Refuses a vLLM that this module cannot plug into."""
    _host_names.check_names(tested(), names)


def refuse(what: str, allowed: str) -> NoReturn:
    """Says what vLLM asks for, and that it is not served."""
    raise NotImplementedError(f"{what}; flashtile's backend for vLLM allows {allowed}")


def wanted_on_cpu() -> bool:
    """Whether the user has asked for flashtile in the place of vLLM's own CPU attention."""
    switch = os.environ.get(SWITCH)
    if switch is None:
        return PLUGIN in os.environ.get("VLLM_PLUGINS", "").split(",")
    if switch not in ("0", "1"):
        raise ValueError(f"{SWITCH} is {switch!r}; allowed: 0, 1")
    return switch == "1"


def stranger(member: Any) -> str | None:
    """The backend of another plug-in that stands under a name of vLLM's, if any."""
    path: str | None = member.get_path() if member.is_overridden() else None
    return None if path is None or path.startswith(f"{__package__}.") else path


def register() -> None:
    """Registers the backend ``CUSTOM`` and, where that is asked for, replaces ``CPU_ATTN``.

    Called twice, it does nothing the second time. Another plug-in's ``CUSTOM`` stays.

    Raises:
        ValueError: FLASHTILE_VLLM is neither 0 nor 1.
        ImportError: This vLLM has moved a name that flashtile needs, and it was asked for on the
            CPU. Where it was not, a warning says so.
        RuntimeError: Another plug-in has replaced CPU_ATTN, and flashtile was asked for, too.
    """
    wanted = wanted_on_cpu()
    try:
        check_names(NEEDED)
    except ImportError as error:
        if wanted:
            raise
        logger.warning("flashtile is not registered: %s", error)
        return
    registry = importlib.import_module(REGISTRY)
    members, set_backend = registry.AttentionBackendEnum, registry.register_backend
    custom, on_cpu = members.CUSTOM, members.CPU_ATTN
    if wanted and (other := stranger(on_cpu)):
        raise RuntimeError(
            f"{SWITCH} or VLLM_PLUGINS asks for flashtile on the CPU, where {other} has replaced "
            f"CPU_ATTN; allowed: one of them, by VLLM_PLUGINS or {SWITCH}=0"
        )
    if custom.is_overridden() and not stranger(custom) and on_cpu.is_overridden() is wanted:
        return
    if other := stranger(custom):
        told = f"CUSTOM is {other}, so flashtile is not CUSTOM"
    else:
        set_backend(custom, f"{BACKENDS}.Backend")
        told = "flashtile is the attention backend CUSTOM"
    if wanted:
        set_backend(on_cpu, f"{BACKENDS}.CPUBackend")
        logger.info("%s, and CPU_ATTN in the place of vLLM's own", told)
    else:
        logger.info("%s; CPU_ATTN is vLLM's own (%s=1 replaces it)", told, SWITCH)
