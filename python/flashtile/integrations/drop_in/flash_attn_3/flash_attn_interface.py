"""flash_attn_interface, as flashtile computes it: see flashtile.integrations.flash_attn_3."""

from flashtile.integrations.flash_attn_3 import *  # noqa: F403

IS_FLASHTILE = True
