"""A plain read of GPU memory: what attention is held against. Imported only where Triton is."""

# No "from __future__ import annotations": Triton looks at the annotations of its kernels.
import torch
import triton
import triton.language as tl
from torch import Tensor

# A GPU reads fastest with many loads in flight; which shape has them depends on the number of
# bytes, so that each is tried at each point: int32 elements of a load, programs per
# multiprocessor, warps per program.
SHAPES = ((4096, 8, 8), (8192, 4, 8), (2048, 16, 4))
SINK_ELEMENTS = 1 << 14  # more than there are programs


@triton.jit
def _read(source, sink, num_loads, SIZE: tl.constexpr):
    total = tl.zeros((SIZE,), dtype=tl.int32)
    for index in range(tl.program_id(0), num_loads, tl.num_programs(0)):
        offsets = index.to(tl.int64) * SIZE + tl.arange(0, SIZE)
        total += tl.load(source + offsets)
    # The sum has to be used, or nothing would be read.
    tl.store(sink + tl.program_id(0), tl.sum(total, axis=0))


def read(source: Tensor, sink: Tensor, shape: tuple[int, int, int]) -> None:
    """Reads int32 ``source``, a whole number of loads, and leaves sums in int32 ``sink``."""
    size, per_multiprocessor, num_warps = shape
    properties = torch.cuda.get_device_properties(source.device)
    num_loads = source.numel() // size
    programs = min(num_loads, per_multiprocessor * properties.multi_processor_count)
    _read[(programs,)](source, sink, num_loads, SIZE=size, num_warps=num_warps)
