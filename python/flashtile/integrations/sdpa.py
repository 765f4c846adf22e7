"""torch's scaled_dot_product_attention on flashtile.

>>> import flashtile
>>> with flashtile.use_as_sdpa() as handle:
...     model(inputs)
>>> handle.counts

Importing this module changes nothing but the list of
``torch.nn.attention.list_flash_attention_impls()``, which then has "FLASHTILE".

`Library("aten", "IMPL")` puts our kernels before torch's in its dispatcher, and destroying it takes
them away. What flashtile refuses goes on to the kernel that was there before.
"""

import inspect
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.nn.attention import register_flash_attention_impl

from flashtile.integrations import _sdpa_ops

NAME = "FLASHTILE"  # among torch's implementations of flash attention

_TESTED = "torch 2.13"


class Counts(NamedTuple):
    """How many calls of torch's ops came by since a handle was made."""

    served: int  # forward calls that ran on flashtile
    served_backward: int
    passed_on: dict[str, int]  # by the sentence that says why; forward and backward


class _Op(NamedTuple):
    """An op of aten, the keys where it is overridden, and by what."""

    name: str
    keys: tuple[str, ...]
    function: Callable[..., Any]

    @property
    def op(self) -> Any:
        return getattr(torch.ops.aten, self.name).default

    def original(self, key: str) -> Any:
        """The kernel in place, or None: torch has no flash attention for packed CPU tensors."""
        name = f"aten::{self.name}"
        if self.name == _MATH.name or not torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
            return None
        return torch.library.get_kernel(name, key)


_MATH = _Op(
    "_scaled_dot_product_attention_math",
    # It has no kernel, but is made of other ops, which have gradients: it is met above those.
    ("AutogradCPU", "CPU"),
    _sdpa_ops.scaled_dot_product_attention_math,
)
_OPS = (
    _Op(
        "_scaled_dot_product_flash_attention_for_cpu",
        ("CPU",),
        _sdpa_ops.scaled_dot_product_flash_attention_for_cpu,
    ),
    _Op(
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        ("CPU",),
        _sdpa_ops.scaled_dot_product_flash_attention_for_cpu_backward,
    ),
    _Op(
        "_scaled_dot_product_flash_attention",
        ("CUDA",),
        _sdpa_ops.scaled_dot_product_flash_attention,
    ),
    _Op(
        "_scaled_dot_product_flash_attention_backward",
        ("CUDA",),
        _sdpa_ops.scaled_dot_product_flash_attention_backward,
    ),
    _Op("_flash_attention_forward", ("CPU", "CUDA"), _sdpa_ops.flash_attention_forward),
    _Op(
        "_flash_attention_forward_no_dropout_inplace",
        ("CPU", "CUDA"),
        _sdpa_ops.flash_attention_forward_no_dropout_inplace,
    ),
    _Op("_flash_attention_backward", ("CPU", "CUDA"), _sdpa_ops.flash_attention_backward),
    _MATH,
)


@dataclass(eq=False)
class Handle:
    """flashtile behind torch's attention, until `remove`, or until the ``with`` block ends."""

    strict: bool
    is_active: bool = True
    _served: list[int] = field(default_factory=lambda: [0, 0])  # forward, backward
    _passed_on: dict[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> Counts:
        """What came by so far, of all threads."""
        with _lock:
            return Counts(self._served[0], self._served[1], dict(self._passed_on))

    def remove(self) -> None:
        """Takes this handle away; torch's kernels are back when it was the last. Safe twice."""
        with _lock:
            if self.is_active:
                self.is_active = False
                _handles.remove(self)
                if not _handles:
                    _restore()

    def __enter__(self) -> "Handle":
        """Itself: it was active before."""
        if not self.is_active:
            raise RuntimeError("this handle was removed; allowed: another use_as_sdpa()")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Removes it."""
        self.remove()


_lock = threading.RLock()
_handles: list[Handle] = []
_libraries: list[torch.library.Library] = []  # one while a handle is active
# Another thread may be inside of a kernel that is taken away. Held here, it is never freed.
_kernels: list[Any] = []


def _note_served(index: int) -> None:
    with _lock:
        for handle in _handles:
            handle._served[index] += 1


def _note_passed_on(reason: str, error: Exception) -> None:
    """Counts it, warns of it once, or raises where a handle is strict."""
    with _lock:
        is_new = any(reason not in handle._passed_on for handle in _handles)
        is_strict = any(handle.strict for handle in _handles)
        for handle in _handles:
            handle._passed_on[reason] = handle._passed_on.get(reason, 0) + 1
    if is_strict:
        raise RuntimeError(reason) from error
    if is_new:
        warnings.warn(f"passed on to torch's own attention: {reason}", stacklevel=4)


def _override(op: _Op, original: Any) -> Callable[..., Any]:
    """The kernel that the dispatcher calls."""
    function = op.function
    index = 1 if "backward" in op.name else 0

    def kernel(keyset: Any, *args: Any, **rest: Any) -> Any:
        try:
            result = function(*args, **rest)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error)
            if "; allowed" not in reason:  # it failed, and was not refused
                raise
            if original is None:
                raise RuntimeError(reason) from error
            _note_passed_on(reason, error)
        else:
            _note_served(index)
            return result
        return original.call_boxed(keyset, *args, **rest)

    return kernel


def _override_math() -> Callable[..., Any]:
    """The same for an op without a kernel: what it is made of stands in for one."""
    default = _MATH.op

    class Original:
        def call_boxed(self, _keyset: Any, *args: Any, **rest: Any) -> Any:
            return default.decompose(*args, **rest)

    original = Original()
    kernel = _override(_MATH, original)

    def chosen(keyset: Any, *args: Any, **rest: Any) -> Any:
        # sdpa_kernel(SDPBackend.MATH): the caller chose it.
        if not torch.backends.cuda.flash_sdp_enabled():  # type: ignore[no-untyped-call]
            return original.call_boxed(keyset, *args, **rest)
        return kernel(keyset, *args, **rest)

    return chosen


def _check_schema(op: _Op) -> None:
    """RuntimeError where this torch has another op under the name."""
    accepted = inspect.signature(op.function).parameters
    takes_rest = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    found = getattr(getattr(torch.ops.aten, op.name, None), "default", None)
    arguments = [] if found is None else found._schema.arguments
    positional = [a.name for a in arguments if not a.kwarg_only]
    ours = [n for n, p in accepted.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = {a.name for a in arguments if a.kwarg_only}
    if positional != ours or not (takes_rest or named <= accepted.keys()):
        raise RuntimeError(
            f"torch {torch.__version__} has no aten::{op.name} with the arguments that flashtile "
            f"overrides; tested with {_TESTED}"
        )


def _check_alone() -> None:
    """RuntimeError where FA3, FA4 or another implementation stands where we would."""
    current = torch.nn.attention.current_flash_attention_impl()
    if current not in (None, NAME):
        raise RuntimeError(
            f"torch's flash attention is {current}; allowed: torch's own "
            "(torch.nn.attention.restore_flash_attention_impl())"
        )


def _install() -> None:
    for op in _OPS:
        _check_schema(op)
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    _libraries.append(library)
    with warnings.catch_warnings():
        # It is what we are here for.
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for op in _OPS:
            for key in op.keys:
                original = op.original(key)
                if original is None and key == "CUDA":
                    continue  # this torch was built without it
                kernel = _override_math() if op is _MATH else _override(op, original)
                library.impl(op.name, kernel, key, with_keyset=True)  # type: ignore[no-untyped-call]
                _kernels.append(torch.library.get_kernel(f"aten::{op.name}", key))


def _restore() -> None:
    _libraries.pop()._destroy()  # type: ignore[no-untyped-call]


def activate(*, strict: bool = False) -> Handle:
    """What :func:`flashtile.use_as_sdpa` does."""
    if not isinstance(strict, bool):
        raise TypeError(f"strict is a {type(strict).__name__}; allowed: bool")
    with _lock:
        _check_alone()
        if not _handles:
            _install()
        handle = Handle(strict)
        _handles.append(handle)
    return handle


def active() -> tuple[Handle, ...]:
    """The handles that are active now, the oldest first: also that of torch's registry."""
    with _lock:
        return tuple(_handles)


register_flash_attention_impl(NAME, register_fn=activate)
