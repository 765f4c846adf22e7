"""Gradients under ``torch.func``: grad, vjp, jacrev and vmap, in any nesting.

torch.func asks for ``torch.autograd.Function`` with setup_context, which the autograd formula of an
op is not. These two call the ops and share their formula.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from flashtile import _checks, _registration


class _Backward(torch.autograd.Function):
    """The op ``flashtile::backward``, which has no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.flashtile.backward(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(_ctx: Any, _inputs: tuple[Any, ...], _output: Any) -> None:
        """Nothing is kept: there is no second derivative."""

    jvp = staticmethod(_checks.refuse_tangents)  # type: ignore[assignment]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        _registration.refuse_second_derivative(ctx, *grads)


class Attention(torch.autograd.Function):
    """The op ``flashtile::forward``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.flashtile.forward(*args)  # type: ignore[no-any-return]

    setup_context = staticmethod(_registration.setup_context)

    jvp = staticmethod(_checks.refuse_tangents)  # type: ignore[assignment]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> _registration.Gradients:
        return _registration.gradients(_Backward.apply, ctx, *grads)


def is_active() -> bool:
    """Whether a torch.func transform is running, eagerly: compilers trace the op itself."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
