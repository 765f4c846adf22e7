"""flash_attn, as flashtile computes it: see flashtile.integrations.flash_attn."""

from pkgutil import extend_path

from flashtile.integrations.flash_attn import *  # noqa: F403

# Other distributions put packages below this name.
__path__ = extend_path(__path__, __name__)  # noqa: F405

IS_FLASHTILE = True
