"""See flashtile.integrations.flash_attn.bert_padding."""

from flashtile.integrations.flash_attn.bert_padding import *  # noqa: F403
from flashtile.integrations.flash_attn.bert_padding import __getattr__  # noqa: F401
