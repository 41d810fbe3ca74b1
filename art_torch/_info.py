"""What was built, and what of it is in use."""

from __future__ import annotations

from typing import NamedTuple

import torch

from art_torch import _C


class Info(NamedTuple):
    """What :func:`info` returns.

    Attributes:
        cpu_target: The SIMD target of the CPU kernels in use: the best one that the machine runs,
            or the one that the environment variable ``ART_CPU`` names.
        cpu_targets: All SIMD targets that were compiled, the best first, and whether this machine
            runs them.
        cuda: Whether CUDA kernels were compiled.
        torch_abi: The oldest torch whose stable ABI the library was compiled for.
    """

    cpu_target: str
    cpu_targets: dict[str, bool]
    cuda: bool
    torch_abi: str


def info() -> Info:
    """What was built, and what of it is in use.

    Raises:
        RuntimeError: ``ART_CPU`` names no target, or one that this machine does not run.
    """
    cuda = torch._C._dispatch_has_kernel_for_dispatch_key("art::decode_attention", "CUDA")
    return Info(_C.cpu_target(), _C.cpu_targets(), cuda, _C.stable_abi_target)
