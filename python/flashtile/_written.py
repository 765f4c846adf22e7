"""What torch has to know of an op that writes to its arguments."""

import torch
from torch import Tensor


def mark_written(*tensors: Tensor) -> None:
    """Backward passes that saved these tensors must fail; the op cannot say so itself."""
    if not torch.compiler.is_compiling():  # compiled graphs do it themselves
        torch.autograd.graph.increment_version(tensors)
