"""See flashtile.integrations.flash_attn.layers.rotary."""

from flashtile.integrations.flash_attn.layers.rotary import *  # noqa: F403
