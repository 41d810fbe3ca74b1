"""ggml's flash attention, called through its C interface (get_cpu_peers.py compiles it)."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from common import huge_pages
from decode_implementations import Implementation
from decode_inputs import DTYPES, Case, Inputs
from torch import Tensor

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}  # enum ggml_type
# Which caches are measured beside which of ours.
KINDS = {"bf16": ("f16", "bf16"), "f16": ("f16",), "f32": ()}
# With values in float16 ggml also sums up in float16.
TOLERANCE = {"f16": 5e-2, "bf16": 1e-2}


class InitParams(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


SIGNATURES = {
    "base": {
        "ggml_tensor_overhead": (c_size_t, []),
        "ggml_graph_overhead": (c_size_t, []),
        "ggml_init": (c_void_p, [InitParams]),
        "ggml_new_tensor_4d": (c_void_p, [c_void_p, c_int, *4 * [c_int64]]),
        "ggml_flash_attn_ext": (c_void_p, [*5 * [c_void_p], *3 * [c_float]]),
        "ggml_new_graph": (c_void_p, [c_void_p]),
        "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
        "ggml_backend_cpu_buffer_from_ptr": (c_void_p, [c_void_p, c_size_t]),
        "ggml_backend_tensor_alloc": (c_int, [c_void_p, c_void_p, c_void_p]),
        "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    },
    "cpu": {
        "ggml_backend_cpu_init": (c_void_p, []),
        "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    },
}


class Ggml:
    """The library, and a backend for its graphs.

    It is linked to OpenMP, as ggml is by default, and so computes with PyTorch's threads.
    """

    def __init__(self, folder: Path) -> None:
        for part, functions in SIGNATURES.items():
            library = ctypes.CDLL(str(folder / f"libggml-{part}.so"), ctypes.RTLD_GLOBAL)
            for name, (result, arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)
        self.backend = self.backend_cpu_init()

    def place(self, tensor: int, data: Tensor) -> int:
        """Lets ggml's ``tensor`` be the memory of ``data``; returns it."""
        address = data.data_ptr()
        buffer = self.backend_cpu_buffer_from_ptr(address, data.numel() * data.itemsize)
        if self.backend_tensor_alloc(buffer, tensor, address):
            raise RuntimeError(f"ggml does not take a tensor at {address:#x}")
        return tensor

    def tensor(self, context: int, data: Tensor) -> int:
        """``data``, contiguous and of four dimensions, as ggml's (last dimension first)."""
        new = self.new_tensor_4d(context, TYPES[data.dtype], *reversed(data.shape))
        return self.place(new, data)

    def __call__(self, case: Case, inputs: Inputs) -> dict[str, Implementation]:
        """Attention over the tokens of a case, in the kinds of cache that are compared with it."""
        self.backend_cpu_set_n_threads(self.backend, case.threads)
        mask = None
        if case.ragged:
            mask = torch.zeros(case.batch, 1, 1, case.tokens, dtype=torch.float16)
            for row, tokens in enumerate(case.lens):
                mask[row, ..., tokens:] = float("-inf")
        query, implementations = inputs.query.float(), {}
        for kind in KINDS[case.dtype]:
            keys, values = (
                of if kind == case.dtype else converted(of, DTYPES[kind])
                for of in (inputs.keys, inputs.values)
            )
            implementations[f"ggml_{kind}"] = Implementation(
                Attention(self, query, keys, values, mask),
                case.kv_bytes,
                TOLERANCE[kind],
                "contiguous cache" + (", mask" if case.ragged else ""),
            )
        return implementations


class Attention:
    """A graph of one flash attention.

    Args:
        ggml: The library.
        query: float32 ``[B, Hq, D]``.
        keys: ``[B, Hkv, S, D]``.
        values: As the keys.
        mask: float16 ``[B, 1, 1, S]``, added to the logits.
    """

    def __init__(
        self, ggml: Ggml, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> None:
        self.ggml, self.out = ggml, torch.empty(query.shape)
        self.memory = (query, keys, values, mask)  # ggml knows only where they are
        # A few kilobytes, which stay in use.
        size = 8 * ggml.tensor_overhead() + ggml.graph_overhead()
        context = ggml.init(InitParams(size, None, True))
        tensors = [ggml.tensor(context, data) for data in (query[:, :, None], keys, values)]
        tensors.append(None if mask is None else ggml.tensor(context, mask))
        scale = query.shape[-1] ** -0.5
        result = ggml.place(ggml.flash_attn_ext(context, *tensors, scale, 0.0, 0.0), self.out)
        self.graph = ggml.new_graph(context)
        ggml.build_forward_expand(self.graph, result)

    def __call__(self) -> Tensor:
        """Returns float32 ``[B, Hq, D]``."""
        if status := self.ggml.backend_graph_compute(self.ggml.backend, self.graph):
            raise RuntimeError(f"ggml_backend_graph_compute must return 0, got {status}")
        return self.out


def converted(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    return huge_pages(*tokens.shape, dtype=dtype).copy_(tokens)
