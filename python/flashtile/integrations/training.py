"""What torch's training tools want to know about flashtile beside what it registers on import.

FLOP formulas and the placements of DTensors are registered with the ops; DDP and FSDP need nothing.
"""

import torch
from torch._ops import OpOverload

#: Ops whose results selective checkpointing should keep: for
#: ``torch.utils.checkpoint.create_selective_checkpoint_contexts(list(OPS_TO_SAVE))``. Their out and
#: log-sum-exp are all that a backward pass needs beside q, k and v.
OPS_TO_SAVE: tuple[OpOverload, ...] = (
    torch.ops.flashtile.forward.default,
    torch.ops.flashtile.forward_max_logit.default,
)
