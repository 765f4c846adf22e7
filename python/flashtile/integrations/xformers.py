"""xformers' memory_efficient_attention and its masks, on flashtile.

>>> from flashtile.integrations import xformers
>>> from flashtile.integrations.xformers import ops as xops
>>> out = xops.memory_efficient_attention(q, k, v, attn_bias=xops.LowerTriangularMask())

``ops`` has the names of ``xformers.ops``, ``attn_bias`` those of ``xformers.ops.fmha.attn_bias``.
The real xformers is neither needed nor touched.
"""

from flashtile.integrations import _xformers_bias as attn_bias
from flashtile.integrations import _xformers_ops as ops
from flashtile.integrations._xformers_ops import memory_efficient_attention

__all__ = ["attn_bias", "memory_efficient_attention", "ops"]
