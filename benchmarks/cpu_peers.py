"""Other libraries' decode attention on the CPU, for bench_decode.py. Each is optional.

``make cpu-peers`` installs them all. They get the same tokens as art_torch, in memory with huge
pages and in the layout that is their own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from common import huge_pages
from cpu_ggml import Ggml, converted
from decode_implementations import TOLERANCE, Implementation
from decode_inputs import DTYPES, Case, Inputs, expected_output
from get_cpu_peers import GGML_SOURCE, VLLM, peer_folder
from torch import Tensor

Peer = Callable[[Case, Inputs], dict[str, Implementation]]
INT8_STEP = 4.0 / 127  # normal tokens reach about 4; what is larger is clamped


class PeerMissing(Exception):
    """Why a peer is not measured."""


def find_peers(avx2: bool) -> tuple[dict[str, Peer], dict[str, str]]:
    """The libraries that are here, and of the others the reason.

    Args:
        avx2: Whether only those are wanted that can be held to AVX2.
    """
    peers: dict[str, Peer] = {}
    reasons: dict[str, str] = {}
    for name, load in (("onnxruntime", load_ort), ("ggml", load_ggml), ("vllm", load_vllm)):
        try:
            peers[name] = load(avx2)
        except PeerMissing as reason:
            reasons[name] = str(reason)
    return peers, reasons


def versions_of(peers: dict[str, Peer]) -> dict[str, str]:
    """For the head of a result file."""
    pinned = {"ggml": GGML_SOURCE, "vllm": VLLM}
    found = dict(pinned[name].split("==") for name in peers if name in pinned)
    return found | {name: version(name) for name in peers if name not in pinned}


def load_ort(avx2: bool) -> Peer:
    if avx2:
        raise PeerMissing("it chooses the instructions itself")
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise PeerMissing(f"no package {package}: run `make cpu-peers`")
    return ort_group_query_attention


def load_ggml(avx2: bool) -> Peer:
    if avx2:
        raise PeerMissing("it is compiled for all instructions of this machine")
    folder = peer_folder(GGML_SOURCE)
    if not folder.exists():
        raise PeerMissing(f"no {folder}: run `make cpu-peers`")
    return Ggml(folder)


def load_vllm(avx2: bool) -> Peer:
    """Its rule for which of its libraries fits the machine."""
    folder = peer_folder(VLLM)
    if not folder.exists():
        raise PeerMissing(f"no {folder}: run `make cpu-peers`")
    name = "_C_AVX2"
    if torch.cpu._is_avx512_supported() and not avx2:
        name = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
    try:
        torch.ops.load_library(folder / f"{name}.abi3.so")
    except OSError as error:  # most likely another PyTorch than the one it was built with
        raise PeerMissing(f"{name}.abi3.so of {VLLM} does not load: {error}") from error
    return vllm_attention


def ort_model(case: Case, cache_type: int, element_type: int) -> bytes:
    """An ONNX model of one GroupQueryAttention whose caches are inputs and outputs."""
    from onnx import TensorProto, helper

    def info(name: str, kind: int, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    heads, dim = case.num_kv_heads, case.head_dim
    cache = (case.batch, heads, case.tokens, dim)
    given = [
        info("query", element_type, case.batch, 1, case.num_q_heads * dim),
        info("key", element_type, case.batch, 1, heads * dim),
        info("value", element_type, case.batch, 1, heads * dim),
        info("past_key", cache_type, *cache),
        info("past_value", cache_type, *cache),
        info("seqlens_k", TensorProto.INT32, case.batch),
        info("total_sequence_length", TensorProto.INT32, 1),
    ]
    results = [
        info("output", element_type, case.batch, 1, case.num_q_heads * dim),
        info("present_key", cache_type, *cache),
        info("present_value", cache_type, *cache),
    ]
    names = [value.name for value in given]
    constants, attributes = [], {"num_heads": case.num_q_heads, "kv_num_heads": heads}
    if cache_type == TensorProto.INT8:
        scales = ["k_scale", "v_scale"]
        constants = [
            helper.make_tensor(name, TensorProto.FLOAT, [1], [INT8_STEP]) for name in scales
        ]
        names += [*5 * [""], *scales]  # cos_cache to head_sink are left out
        attributes |= {f"{which}_quant_type": "PER_TENSOR" for which in "kv"}
        attributes["kv_cache_bit_width"] = 8
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        [value.name for value in results],
        domain="com.microsoft",
        **attributes,
    )
    graph = helper.make_graph([node], "decode", given, results, constants)
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(
        graph, opset_imports=versions, ir_version=8
    ).SerializeToString()
    return model


def ort_call(case: Case, query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], Tensor]:
    """A call of ONNX Runtime that reads the caches ``[B, Hkv, S, D]`` where they are.

    The operator also appends a token in place: each sequence's last one, which is there already.
    """
    import onnxruntime
    from onnx import helper

    kinds = [helper.np_dtype_to_tensor_dtype(of.numpy().dtype) for of in (keys, query)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
    # Or its threads would disturb whoever has the next turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        ort_model(case, *kinds), options, providers=["CPUExecutionProvider"]
    )
    lens = torch.tensor(case.lens, dtype=torch.int32)
    last = (torch.arange(case.batch), slice(None), lens.long() - 1)
    step = INT8_STEP if keys.dtype == torch.int8 else 1.0
    out = torch.empty(case.batch, 1, case.num_q_heads * case.head_dim, dtype=query.dtype)
    given = {
        "query": query.reshape(out.shape),
        "key": (keys[last].to(query.dtype) * step).view(case.batch, 1, -1),
        "value": (values[last].to(query.dtype) * step).view(case.batch, 1, -1),
        "past_key": keys,
        "past_value": values,
        "seqlens_k": lens - 1,
        "total_sequence_length": lens.max()[None],
    }
    results = {"output": out, "present_key": keys, "present_value": values}
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, given), (binding.bind_output, results)):
        for name, tensor in tensors.items():
            bind(name, "cpu", 0, tensor.numpy().dtype, list(tensor.shape), tensor.data_ptr())

    # The binding knows only where the tensors are, so somebody has to hold them.
    def call(alive: Any = (given, results)) -> Tensor:
        session.run_with_iobinding(binding)
        return out

    return call


def ort_group_query_attention(case: Case, inputs: Inputs) -> dict[str, Implementation]:
    """In the dtype of the case, if ONNX Runtime has it, and beside float32 with a cache of int8."""
    if case.dtype == "bf16":
        return {}
    keys, values, tolerance = inputs.keys, inputs.values, TOLERANCE[case.dtype]
    note = "contiguous cache, threads of its own"
    implementations = {
        "ort": Implementation(
            ort_call(case, inputs.query, keys, values), case.kv_bytes, tolerance, note, True
        )
    }
    if case.dtype == "f32":
        keys, values = (
            converted((of / INT8_STEP).round_().clamp_(-127, 127), torch.int8)
            for of in (keys, values)
        )
        implementations["ort_int8"] = Implementation(
            ort_call(case, inputs.query, keys, values),
            case.kv_bytes // 4,
            1e-4,
            f"{note}, a scale per tensor",
            True,
            expected_output(inputs.query, keys * INT8_STEP, values * INT8_STEP, case.lens),
        )
    return implementations


def vllm_attention(case: Case, inputs: Inputs) -> dict[str, Implementation]:
    """vLLM's operator on pages of its own layout, which the same block table orders."""
    page, heads, dim = case.page_size, case.num_kv_heads, case.head_dim
    if page % 32:
        raise ValueError(f"vLLM's pages must be a multiple of 32 tokens, got {page}")
    dtype = DTYPES[case.dtype]
    amx = case.dtype == "bf16" and torch.cpu._is_amx_tile_supported()
    isa = "amx" if amx else "vec"
    num_pages = int(inputs.block_table.max()) + 1
    key_cache, value_cache = huge_pages(num_pages, heads, 2 * page, dim, dtype=dtype).chunk(2, 2)
    operators = torch.ops._C
    for row, tokens in enumerate(case.lens):
        slots = inputs.block_table[row, :, None] * page + torch.arange(page)
        operators.cpu_attn_reshape_and_cache(
            inputs.keys[row, :, :tokens].transpose(0, 1).contiguous(),
            inputs.values[row, :, :tokens].transpose(0, 1).contiguous(),
            key_cache,
            value_cache,
            slots.flatten()[:tokens].long(),
            isa,
        )
    starts = torch.arange(case.batch + 1, dtype=torch.int32)
    sizes = (case.batch, case.num_q_heads, heads, dim)
    # Causal, no window, splits allowed: as its backend asks for.
    plan = operators.get_scheduler_metadata(
        *sizes, inputs.seq_lens, dtype, starts, True, -1, isa, True, None
    )
    out = torch.empty_like(inputs.query)
    caches = (inputs.query, key_cache, value_cache, out, starts, inputs.seq_lens)
    rule = (dim**-0.5, True, None, -1, inputs.block_table, 0.0, plan, None, None)

    def call() -> Tensor:
        operators.cpu_attention_with_kv_cache(*caches, *rule)
        return out

    note = f"pages of its layout, isa {isa}, scheduled before"
    return {"vllm": Implementation(call, case.kv_bytes, TOLERANCE[case.dtype], note)}
