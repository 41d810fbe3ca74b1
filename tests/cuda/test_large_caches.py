"""Offsets beyond 2^31 and 2^32 elements."""

import pytest
import torch
from cases import Inputs
from gpu_helpers import EARLY, assert_same_bits, call_split

from art_torch import append_kv

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda

GIB = 1 << 30
PAGE, HEADS = 16, 8


def needs_memory(num_bytes):
    free, _ = torch.cuda.mem_get_info()
    if free < num_bytes:
        pytest.skip(
            f"needs {num_bytes / GIB:.0f} GiB of free GPU memory, there are {free / GIB:.1f}"
        )


@pytest.fixture
def huge(gpu):
    """Keys and values of more than 2^32 elements in one buffer; a page holds both."""
    needs_memory(10 * GIB)
    num_pages = (1 << 32) // (2 * PAGE * HEADS * 128) + 128
    buffer = torch.empty(num_pages, 2, PAGE, HEADS, 128, dtype=torch.bfloat16, device=gpu)
    yield buffer
    del buffer
    torch.cuda.empty_cache()


def far_pages(buffer, count):
    """Pages right behind each 2^31 elements, at the start and at the end."""
    stride = buffer.stride(0)
    starts = [0, -(-(1 << 31) // stride), -(-(1 << 32) // stride), buffer.shape[0] - count]
    return torch.tensor([[start + i for i in range(count)] for start in starts])


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("num_splits", [0, 1, 4])
@pytest.mark.parametrize(("group", "unit_size"), [(4, 16), (4, 8), (20, 16)])
def test_pages_beyond_two_to_the_32(group, unit_size, num_splits, layout, huge):
    """The same tokens in a small cache give the same bits; groups and units lead to all kernels."""
    device, count = huge.device, 40
    pages = far_pages(huge, count)
    assert int(pages[1, 0]) * huge.stride(0) >= 1 << 31
    assert int(pages[3, -1]) * huge.stride(0) > 1 << 32
    g = torch.Generator(device).manual_seed(0)
    small = torch.randn(4 * count, *huge.shape[1:], dtype=huge.dtype, device=device, generator=g)
    huge[pages.flatten().to(device)] = small
    own = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(count, generator=own) for _ in range(4)])
    tables = pages.gather(1, order), order + count * torch.arange(4)[:, None]
    lens = torch.tensor([640, 601, 333, 640], dtype=torch.int32, device=device)
    query = 3 * torch.randn(4, HEADS * group, 128, dtype=huge.dtype, device=device, generator=g)
    for criterion in (None, EARLY):
        results = []
        for buffer, table in zip((huge, small), tables, strict=True):
            caches = buffer.unbind(1)
            if layout == "hnd":  # the same memory, read as if heads came before tokens
                strides = (buffer.stride(0), 128, PAGE * 128, 1)
                caches = [cache.as_strided(cache.shape, strides) for cache in caches]
            tensors = (query, *caches, table.to(device, torch.int32), lens)
            inputs = Inputs(tensors, {"walk": "sink_recent", "unit_size": unit_size})
            results.append(call_split(inputs, criterion, num_splits))
        assert_same_bits(results[0], results[1])
        assert results[0].out.isfinite().all()


@pytest.mark.parametrize("dim", [128, 127])
def test_append_beyond_two_to_the_32(dim, huge):
    """Also where a row is no multiple of 16 bytes."""
    device = huge.device
    keys, values = (cache[..., :dim] for cache in huge.unbind(1))
    pages = far_pages(huge, 2).flatten().to(device)
    slots = pages * PAGE + torch.arange(len(pages), device=device) % PAGE
    g = torch.Generator(device).manual_seed(0)
    key, value = torch.randn(2, len(slots), HEADS, dim, device=device, generator=g).bfloat16()
    row, offset = torch.arange(len(pages), device=device), slots % PAGE
    expected = torch.full_like(huge[pages], 7.0)
    expected[row, 0, offset, :, :dim] = key
    expected[row, 1, offset, :, :dim] = value
    for mapping in (slots, slots[:, None].expand(-1, HEADS).contiguous()):
        huge[pages] = 7.0
        append_kv(key, value, keys, values, mapping)
        assert torch.equal(huge[pages], expected)


def test_one_sequence_of_a_million_tokens(gpu):
    """Long walks: token, unit and step counts far beyond 16 bits."""
    needs_memory(6 * GIB)
    tokens, dim = (1 << 20) + 7, 64
    num_pages = -(-tokens // PAGE)
    g = torch.Generator(gpu).manual_seed(0)
    kind = {"dtype": torch.bfloat16, "device": gpu, "generator": g}
    keys, values = (torch.randn(num_pages, PAGE, 1, dim, **kind) for _ in range(2))
    query = torch.randn(1, 4, dim, **kind)
    table = torch.randperm(num_pages, device=gpu, generator=g).int()[None]
    lens = torch.tensor([tokens], dtype=torch.int32, device=gpu)
    inputs = Inputs((query, keys, values, table, lens), {"walk": "oldest_first"})
    order = table[0].long()
    flat_keys = keys[order].view(-1, dim)[:tokens].double()
    flat_values = values[order].view(-1, dim)[:tokens].double()
    logits = query[0].double() @ flat_keys.T * dim**-0.5
    expected = torch.softmax(logits, -1) @ flat_values
    for num_splits in (0, 1, 8):
        result = call_split(inputs, None, num_splits)
        assert result.tokens_read.tolist() == [[tokens]]
        error = (result.out[0].double() - expected).abs().max()
        assert error <= 2**-7 * expected.abs().max()
        torch.testing.assert_close(result.lse[0].double(), logits.logsumexp(-1), rtol=0, atol=2e-3)
