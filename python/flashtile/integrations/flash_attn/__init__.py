"""The functions of the package flash_attn (2.8), computed by flashtile on CPU and CUDA tensors.

``flashtile.install_as("flash_attn")`` lets other packages import them under their usual name; so
does the wheel of ``make drop-in-wheels``. Arguments, defaults and results are those of the peer;
what is different stands in docs/integrations/flash_attn.md.
"""

from flashtile.integrations.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.4"

__all__ = [
    "__version__",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
