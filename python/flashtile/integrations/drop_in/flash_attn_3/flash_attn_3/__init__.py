"""The package that hosts look for beside the module flash_attn_interface; the same functions."""

from flashtile.integrations.flash_attn_3 import *  # noqa: F403

IS_FLASHTILE = True
