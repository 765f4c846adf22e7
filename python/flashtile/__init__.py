"""flashtile: exact attention, forward and backward, for CPU and CUDA tensors.

>>> import torch, flashtile
>>> q = k = v = torch.randn(1, 128, 8, 64)  # (batch, seqlen, heads, head_dim)
>>> out = flashtile.attention(q, k, v, causal=True)
"""

from flashtile import _loader, _registration

_loader.load(__path__)
_registration.register()

from flashtile._build import build_info  # noqa: E402
from flashtile._can_run import can_run, can_run_with_kvcache  # noqa: E402
from flashtile._dropout import dropout_mask, dropout_mask_varlen  # noqa: E402
from flashtile._install_as import install_as  # noqa: E402
from flashtile._kvcache import (  # noqa: E402
    append_kv,
    attention_with_kvcache,
    raise_pending_checks,
)
from flashtile._merging import merge  # noqa: E402
from flashtile._shared_prefix import shared_prefix_attention  # noqa: E402
from flashtile._use_as_sdpa import use_as_sdpa  # noqa: E402
from flashtile.ops import attention, attention_varlen  # noqa: E402

__version__: str = str(build_info()["version"])

__all__ = [
    "__version__",
    "append_kv",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "build_info",
    "can_run",
    "can_run_with_kvcache",
    "dropout_mask",
    "dropout_mask_varlen",
    "install_as",
    "merge",
    "raise_pending_checks",
    "shared_prefix_attention",
    "use_as_sdpa",
]
