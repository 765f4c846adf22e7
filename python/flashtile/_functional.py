"""Gradients of the ops, eagerly, compiled and under torch.func: grad, vjp, jacrev, any nesting.

``torch.library.register_autograd`` builds a formula that torch.func refuses. A formula that acts
on one level at a time, as those of torch's own ops do, serves all of them: the dispatcher calls it
once per level, and tracers see the op.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from flashtile import _checks, _sharding


def is_active() -> bool:
    """Whether a torch.func transform is running."""
    return torch._C._are_functorch_transforms_active()


def _below(op: Any, keyset: Any, args: tuple[Any, ...]) -> Any:
    """The op as it is without gradients."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def register(
    library: torch.library.Library,
    name: str,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    check: Callable[..., None] | None = None,
) -> None:
    """Registers a formula as ``torch.library.register_autograd`` takes it.

    Args:
        library: Of the op.
        name: The op's.
        setup_context: Saves what the formula reads.
        backward: The formula.
        check: Of the op's arguments, before it runs, where a gradient is wanted: raises if there is
            none.
    """
    op = getattr(torch.ops.flashtile, name).default
    parameters = op._schema.arguments

    def with_defaults(args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The dispatcher leaves out arguments that are equal to their defaults."""
        return args + tuple(parameter.default_value for parameter in parameters[len(args) :])

    class Formula(_SingleLevelFunction):
        @staticmethod
        def forward(keyset: Any, *args: Any) -> Any:
            if not is_active():
                return _below(op, keyset, args)
            # For the levels below, whose turn it is now.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return _below(op, keyset, args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, with_defaults(inputs[1:]), output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None, *backward(ctx, *grads))

        jvp = staticmethod(_checks.refuse_tangents)  # type: ignore[assignment]

    def kernel(keyset: Any, *args: Any) -> Any:
        if type(args[0]) is not Tensor:
            _sharding.prepare(args[0])
        requires_grad = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if requires_grad and check is not None:
            check(*args)
        if requires_grad or forward_ad._current_level >= 0:
            if not is_active():
                return Formula.apply(keyset, *args)  # type: ignore[attr-defined]
            with enable_single_level_autograd_function():
                return Formula.apply(keyset, *args)  # type: ignore[attr-defined]
        return _below(op, keyset, args)

    library.impl(name, kernel, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
