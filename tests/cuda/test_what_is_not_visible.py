"""What a sequence may not see cannot reach its result, and results are written completely."""

import math

import pytest
import torch
from cases import LOOSE, Case, Inputs, build
from gpu_helpers import assert_same_bits, bits, call_split

from art_torch import DecodeResult, decode_attention

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda

# Tails of pages, hidden fronts, units that are not listed, rows and heads without a token.
CASES = [
    Case("tails", (700, 1, 65, 0, 129, 2001)),
    Case("pages_of_64", (700, 1, 65, 0), page_size=64),
    Case("starts", (1000, 333, 90), starts=(437, 331, 89)),
    Case("window", (1000, 333, 30), options={"sliding_window": 45}),
    Case("explicit", (1000, 333, 90), walk="explicit"),
    Case("explicit_invisible", (1000, 333), walk="explicit", options={"sliding_window": 200}),
    Case("per_head", ((700, 20), (0, 333)), per_head_table=True),
    Case("hnd", (700, 65), layout="hnd", page_size=64),
    Case("interleaved", (700, 65), layout="interleaved_pages"),
    Case("dense", (700, 65), layout="dense"),
    Case("tokens_last", (700, 65), layout="tokens_last"),
    Case("head_pool", (700, 65), layout="head_pool"),
]
KINDS = [
    (torch.bfloat16, 128),
    (torch.float16, 64),
    (torch.bfloat16, 256),
    (torch.bfloat16, 40),
    (torch.float32, 64),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}_{kind[1]}"[6:])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_garbage_never_reaches_a_result(case, kind, gpu):
    dtype, dim = kind
    case = Case(**{**vars(case), "head_dim": dim, "value_dim": dim, "num_q_heads": 8})
    poisoned = build(case, dtype, gpu)  # NaN wherever nothing may be read
    query, keys, values, table, lens = poisoned.tensors
    assert keys.isnan().any()
    assert values.isnan().any()
    hidden = keys.isnan(), values.isnan()
    last_page = keys.shape[0] - 1
    for num_splits in (0, 1, 4):
        for criterion in (None, LOOSE):
            expected = None
            for garbage in (math.nan, math.inf, 0.0, torch.finfo(dtype).max):
                for cache, where in zip((keys, values), hidden, strict=True):
                    heads = slice(None if cache.stride(2) else 1)  # one pool for all heads
                    cache[:, :, heads].masked_fill_(where[:, :, heads], garbage)
                inputs = Inputs(
                    (query, keys, values, table.clamp(max=last_page), lens), poisoned.options
                )
                result = call_split(inputs, criterion, num_splits)
                assert result.out.isfinite().all()
                expected = result if expected is None else expected
                assert_same_bits(result, expected, f"with {garbage} in hidden places")


@pytest.mark.parametrize("criterion", [None, LOOSE], ids=["exact", "art"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}_{kind[1]}"[6:])
@pytest.mark.parametrize("case", CASES[:6], ids=lambda case: case.name)
def test_out_is_written_completely(case, kind, criterion, gpu):
    dtype, dim = kind
    for heads in ((8, 2), (20, 1)):
        changes = {"head_dim": dim, "value_dim": dim, "num_q_heads": heads[0]}
        if not case.per_head_lens:
            changes["num_kv_heads"] = heads[1]
        inputs = build(Case(**{**vars(case), **changes}), dtype, gpu)
        expected = inputs.call(decode_attention, criterion=criterion)
        out = DecodeResult(
            torch.full_like(expected.out, math.nan),
            torch.full_like(expected.lse, math.nan),
            torch.full_like(expected.tokens_read, -77),
            torch.full_like(expected.stop_block, -77),
        )
        inputs.call(decode_attention, criterion=criterion, out=out)
        assert_same_bits(out, expected)
        assert out.out.isfinite().all()
        assert not out.lse.isnan().any()
        assert (out.tokens_read >= 0).all()
        assert (out.stop_block >= -1).all()


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("lens", [(20_000,), (700, 0, 65)], ids=["long", "ragged"])
def test_nothing_but_the_results_is_written(lens, batch_invariant, gpu):
    """Results lie between guards in one buffer, and the inputs stay as they were."""
    case = Case("guards", lens, 10, 2, head_dim=128, value_dim=128)
    inputs = build(case, torch.bfloat16, gpu)
    before = [tensor.clone() for tensor in inputs.tensors]
    guard, buffers, out = 4096, [], []
    options = {"criterion": LOOSE, "batch_invariant": batch_invariant}
    for tensor in inputs.call(decode_attention, **options):
        buffer = torch.full((tensor.numel() + 2 * guard,), 77, dtype=tensor.dtype, device=gpu)
        buffers.append(buffer)
        out.append(buffer[guard:-guard].view(tensor.shape))
    inputs.call(decode_attention, **options, out=DecodeResult(*out))
    for buffer in buffers:
        assert (buffer[:guard] == 77).all()
        assert (buffer[-guard:] == 77).all()
    for tensor, copy in zip(inputs.tensors, before, strict=True):
        assert torch.equal(bits(tensor), bits(copy))
