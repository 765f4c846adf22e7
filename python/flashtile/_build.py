"""What is in the build of the op library."""

import torch

_LISTS = ("cuda_architectures", "cuda_head_dims", "cpu_instruction_sets")


def build_info() -> dict[str, str | list[str]]:
    """What is in this build.

    Returns:
        ``version``; ``cuda_architectures`` (such as ``["80", "89", "90"]``, empty without CUDA) and
        ``cuda_head_dims`` of the CUDA kernels; ``cpu_instruction_sets`` compiled in and
        ``cpu_instruction_set_used`` on this machine; ``torch_headers``, the torch it was built
        against (it runs with 2.11 and later).
    """
    info: dict[str, str | list[str]] = {}
    for line in torch.ops.flashtile.build_info().splitlines():
        name, _, value = line.partition("=")
        info[name] = [item for item in value.split(",") if item] if name in _LISTS else value
    return info
