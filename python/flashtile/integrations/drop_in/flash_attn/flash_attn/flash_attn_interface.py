"""See flashtile.integrations.flash_attn.flash_attn_interface."""

from flashtile.integrations.flash_attn.flash_attn_interface import *  # noqa: F403
