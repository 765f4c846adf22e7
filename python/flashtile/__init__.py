"""flashtile: exact attention, forward and backward, for CPU and CUDA tensors.

>>> import torch, flashtile
>>> q = k = v = torch.randn(1, 128, 8, 64)  # (batch, seqlen, heads, head_dim)
>>> out = flashtile.attention(q, k, v, causal=True)
"""

from flashtile import _loader, _registration

_loader.load(__path__)
_registration.register()

from flashtile._kvcache import (  # noqa: E402
    attention_with_kvcache,
    can_run_with_kvcache,
    raise_pending_checks,
)
from flashtile._merging import merge  # noqa: E402
from flashtile.ops import attention, attention_varlen, build_info, can_run  # noqa: E402

__version__: str = str(build_info()["version"])

__all__ = [
    "__version__",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "build_info",
    "can_run",
    "can_run_with_kvcache",
    "merge",
    "raise_pending_checks",
]
