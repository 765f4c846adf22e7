"""ggml's FLASH_ATTN_EXT on the backend library of examples/ggml, by ctypes, on torch tensors."""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}  # enum ggml_type
Q8_0 = 8
SUCCESS, FAILED = 0, -1  # enum ggml_status
T = TypeVar("T")
LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class InitParams(Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_dev_by_name": (c_void_p, [c_char_p]),
    "ggml_backend_dev_init": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_free": (None, [c_void_p]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_load": (c_void_p, [c_char_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_flash_attn_ext": (c_void_p, [c_void_p] * 5 + [c_float] * 3),
    "ggml_flash_attn_ext_add_sinks": (None, [c_void_p, c_void_p]),
    "ggml_free": (None, [c_void_p]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_log_set": (None, [LogCallback, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_new_tensor": (c_void_p, [c_void_p, c_int, c_int, POINTER(c_int64)]),
    "ggml_permute": (c_void_p, [c_void_p, c_void_p] + [c_int] * 4),
}


@dataclass
class Op:
    """Tensors of one operation; q, k, v and out as flashtile has them: batch, seqlen, heads, dim.

    bias (1 or batch, 1 or heads, queries, keys) is ggml's mask, and becomes fp16.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    sink: Tensor | None = None
    scale: float = 0.125
    max_bias: float = 0.0
    softcap: float = 0.0


@dataclass
class Backend:
    """A backend of the library in this process, and what ggml logged."""

    ggml: Any
    library: Any
    device: int
    handle: int
    log: list[str] = field(default_factory=list)

    @property
    def computed(self) -> tuple[int, int]:
        """Operations, and those of them whose mask was a bias, of this process."""
        return self.library.flashtile_ggml_operations(), self.with_bias()

    def with_bias(self) -> int:
        return int(self.library.flashtile_ggml_operations_with_bias())

    def set_threads(self, count: int) -> None:
        """By the function that ggml asks the library for."""
        registry = self.ggml.ggml_backend_dev_backend_reg
        registry.restype, registry.argtypes = c_void_p, [c_void_p]
        get = self.ggml.ggml_backend_reg_get_proc_address
        get.restype, get.argtypes = c_void_p, [c_void_p, c_char_p]
        found = get(registry(self.device), b"ggml_backend_set_n_threads")
        ctypes.CFUNCTYPE(None, c_void_p, c_int)(found)(self.handle, count)

    def compute(self, op: Op) -> Tensor:
        """out of an operation that succeeds."""
        status, out = self.run(op)
        assert status == SUCCESS, self.log
        return out

    def run(self, op: Op) -> tuple[int, Tensor]:
        """ggml's status, and out."""

        def run(context: int, node: int) -> tuple[int, Tensor]:
            graph = self.ggml.ggml_new_graph(context)
            self.ggml.ggml_build_forward_expand(graph, node)
            status = self.ggml.ggml_backend_graph_compute(self.handle, graph)
            out = torch.empty(*op.q.shape[:3], op.v.shape[3])
            ctypes.memmove(out.data_ptr(), self.ggml.ggml_get_data(node), out.nbytes)
            return status, out

        return self._with_node(op, run)

    def supports(self, op: Op, cache_type: int | None = None) -> bool:
        """What the device answers; `cache_type` is a type of k and v that torch has not."""
        supports = self.ggml.ggml_backend_dev_supports_op
        return self._with_node(op, lambda _, node: bool(supports(self.device, node)), cache_type)

    def _with_node(self, op: Op, use: Callable[[int, int], T], cache_type: int | None = None) -> T:
        size = (1 << 20) + 4 * op.q[..., 0].numel() * op.v.shape[3]
        for tensor in (op.q, op.k, op.v, op.bias, op.sink):
            size += 0 if tensor is None else 4 * tensor.numel()
        memory = ctypes.create_string_buffer(size)
        address = ctypes.cast(memory, c_void_p)
        context = self.ggml.ggml_init(InitParams(len(memory), address, False))
        assert context
        try:
            q, k, v = (
                self.ggml.ggml_permute(context, self._tensor(context, t, kind), 0, 2, 1, 3)
                for t, kind in ((op.q, None), (op.k, cache_type), (op.v, cache_type))
            )
            bias = None if op.bias is None else self._tensor(context, op.bias.half())
            node = self.ggml.ggml_flash_attn_ext(
                context, q, k, v, bias, op.scale, op.max_bias, op.softcap
            )
            if op.sink is not None:
                sink = self._tensor(context, op.sink)
                self.ggml.ggml_flash_attn_ext_add_sinks(node, sink)
            return use(context, node)
        finally:
            self.ggml.ggml_free(context)

    def _tensor(self, context: int, from_: Tensor, kind: int | None = None) -> int:
        """A ggml tensor with these numbers, or none where `kind` is a type that torch has not."""
        sizes = (c_int64 * 4)(*reversed(from_.shape))
        tensor = self.ggml.ggml_new_tensor(
            context, TYPES[from_.dtype] if kind is None else kind, from_.dim(), sizes
        )
        if kind is None:
            dense = from_.contiguous()
            ctypes.memmove(self.ggml.ggml_get_data(tensor), dense.data_ptr(), dense.nbytes)
        return int(tensor)


@cache
def load(library: Path, folder: Path) -> Backend:
    """Loads ggml from the folder, and the backend library by ggml_backend_load."""
    ggml = ctypes.CDLL(str(folder / "libggml.so"))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
    log: list[str] = []
    keep = LogCallback(lambda _level, text, _data: log.append(text.decode()))
    ggml.ggml_log_set(keep, None)
    assert ggml.ggml_backend_load(str(library).encode()), log
    device = ggml.ggml_backend_dev_by_name(b"FLASHTILE")
    own = ctypes.CDLL(str(library))
    for name in ("flashtile_ggml_operations", "flashtile_ggml_operations_with_bias"):
        getattr(own, name).restype = ctypes.c_uint64
    backend = Backend(ggml, own, device, ggml.ggml_backend_dev_init(device, None), log)
    backend.ggml.keep = keep  # ggml calls it as long as it lives
    return backend
