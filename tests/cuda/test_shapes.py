"""Head counts, sizes and layouts that the common table of cases leaves out, on both schedules."""

import pytest
import torch
from cases import DTYPES, LOOSE, Case, Inputs, build
from contract import check
from gpu_helpers import Remembered, by_dtype, call_split

from art_torch import append_kv, decode_attention, reference

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("one_thread")]

HALVES = (torch.bfloat16, torch.float16)
LENS = (700, 0, 130)
GROUPS = (*range(1, 17), 20, 32, 48, 64)
DIMS = [
    *((d, d) for d in (72, 88, 104, 112, 136, 144, 160, 168, 176, 200, 224, 240, 248)),
    *((128, 64), (96, 128), (256, 128), (200, 80), (40, 72), (64, 192), (128, 136), (248, 256)),
]
LAYOUTS = (
    *("nhd", "hnd", "interleaved_tokens", "interleaved_pages", "padded", "dense", "tokens_last"),
    "head_pool",
)
by_name = {"ids": lambda case: case.name}


def check_case(case, dtype, device, criteria=(None, LOOSE), splits=(0, 1, 4)):
    """The operator, and forced schedules, against the reference."""
    host = build(case, dtype, "cpu")
    host = Remembered(host.tensors, host.options)
    inputs = build(case, dtype, device)
    for criterion in criteria:
        for num_splits in splits:
            check(host, criterion, call_split(inputs, criterion, num_splits))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", HALVES, **by_dtype)
def test_group_sizes(dtype, group, head_dim, gpu):
    dims = {"head_dim": head_dim, "value_dim": head_dim}
    case = Case("group", LENS, num_q_heads=2 * group, num_kv_heads=2, **dims)
    check_case(case, dtype, gpu, (LOOSE,))
    check_case(case, dtype, gpu, (None,), (0,))


@pytest.mark.parametrize("group", [1, 3, 16, 20, 64])
def test_group_sizes_in_float32(group, gpu):
    case = Case("group", LENS, num_q_heads=2 * group, num_kv_heads=2)
    check_case(case, torch.float32, gpu, splits=(0,))


@pytest.mark.parametrize("heads", [(128, 1), (120, 2), (32, 32), (71, 71), (96, 8)])
def test_many_heads(heads, gpu):
    case = Case("heads", (300, 70), *heads, head_dim=128, value_dim=128)
    check_case(case, torch.bfloat16, gpu)


@pytest.mark.parametrize("dims", DIMS, ids=lambda dims: f"{dims[0]}_{dims[1]}")
@pytest.mark.parametrize("dtype", DTYPES, **by_dtype)
def test_head_dims(dtype, dims, gpu):
    case = Case("dims", LENS, 6, 2, head_dim=dims[0], value_dim=dims[1])
    check_case(case, dtype, gpu, splits=(0, 4))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", HALVES, **by_dtype)
def test_layouts(dtype, head_dim, page_size, layout, gpu):
    dims = {"head_dim": head_dim, "value_dim": head_dim, "page_size": page_size, "layout": layout}
    case = Case("layout", (700, 65, 0), 8, 2, **dims)
    check_case(case, dtype, gpu)


SIZES = [
    Case("page_48", LENS, page_size=48),
    Case("page_24_unit_8", LENS, page_size=24, options={"unit_size": 8}),
    Case("page_80", LENS, page_size=80),
    Case("page_512", LENS, page_size=512),
    Case("page_1_unit_1", (70, 9), page_size=1, options={"unit_size": 1, "block_size": 16}),
    Case("unit_1", LENS, options={"unit_size": 1, "block_size": 64}),
    Case("unit_2_block_6", (200, 5), options={"unit_size": 2, "block_size": 6}),
    Case("block_48", LENS, options={"block_size": 48}),
    Case("block_80", LENS, options={"block_size": 80}),
    Case("block_112", LENS, options={"block_size": 112}),
    Case("block_192", LENS, options={"block_size": 192}),
    Case("block_256", LENS, options={"block_size": 256}),
    Case("unit_32_page_256", LENS, page_size=256, options={"unit_size": 32}),
    Case("unit_256_page_256", LENS, page_size=256, options={"unit_size": 256, "block_size": 256}),
    Case("pinned_1", LENS, pinned=1),
    Case("pinned_7", LENS, pinned=7),
    Case("pinned_many", (2000, 700), pinned=90, walk="recent_first"),
    Case("explicit_blocks", (1500, 640), walk="explicit", options={"block_size": 128}),
    Case("explicit_unit_8", LENS, walk="explicit", page_size=32, options={"unit_size": 8}),
    Case("explicit_pages", LENS, walk="explicit", page_size=64, options={"unit_size": 64}),
    Case("explicit_window", (1000, 90), walk="explicit", options={"sliding_window": 300}),
    Case("explicit_starts", (1000, 333), walk="explicit", starts=(437, 300), pinned="per_head"),
    Case("explicit_per_head", ((700, 20), (0, 333)), walk="explicit", per_head_table=True),
    Case(
        "everything",
        (1000, 333),
        starts=(150, 20),
        sinks=True,
        alibi=True,
        options={"softcap": 20.0, "sliding_window": 900},
    ),
    Case("sinks_oldest", LENS, sinks=True, walk="oldest_first"),
    Case("dense_odd_unit", (700, 90), layout="dense", options={"unit_size": 24, "block_size": 72}),
]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("case", SIZES, **by_name)
def test_sizes_and_options(case, head_dim, gpu):
    changes = {"head_dim": head_dim, "value_dim": head_dim, "num_q_heads": 8}
    check_case(Case(**{**vars(case), **changes}), torch.bfloat16, gpu, splits=(0, 1, 2, 7))


# ---------------------------------------------------------------- what 16-byte loads cannot read


def shifted(tensor, elements):
    """A copy with the same strides that starts `elements` later in its memory."""
    memory = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size() + elements,
                         dtype=tensor.dtype, device=tensor.device)  # fmt: skip
    copy = memory.as_strided(tensor.shape, tensor.stride(), elements)
    return copy.copy_(tensor)


@pytest.mark.parametrize("head_dim", [64, 128, 80])
@pytest.mark.parametrize(
    "which", [(0,), (1,), (2,), (0, 1, 2)], ids=["query", "key", "value", "all"]
)
@pytest.mark.parametrize("elements", [1, 2, 4])
@pytest.mark.parametrize("dtype", HALVES, **by_dtype)
def test_data_that_starts_anywhere(dtype, elements, which, head_dim, gpu):
    case = Case("shifted", LENS, 8, 2, head_dim=head_dim, value_dim=head_dim)
    host, inputs = build(case, dtype, "cpu"), build(case, dtype, gpu)
    tensors = list(inputs.tensors)
    for i in which:
        tensors[i] = shifted(tensors[i], elements)
        assert tensors[i].data_ptr() % 16 == elements * tensors[i].element_size()
    for criterion in (None, LOOSE):
        moved = Inputs(tuple(tensors), inputs.options)
        check(host, criterion, moved.call(decode_attention, criterion=criterion))


@pytest.mark.parametrize("odd", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 3, 5)])
@pytest.mark.parametrize("dtype", DTYPES, **by_dtype)
def test_strides_that_are_no_multiple_of_anything(dtype, odd, gpu):
    """Gaps of a few elements between pages, tokens and heads."""
    case = Case("gaps", LENS, 8, 2, head_dim=128, value_dim=128)
    host, inputs = build(case, dtype, "cpu"), build(case, dtype, gpu)

    def spread(cache):
        pages, page, heads, dim = cache.shape
        head = dim + odd[2]
        token = heads * head + odd[1]
        strides = (page * token + odd[0], token, head, 1)
        return torch.full((pages * strides[0],), torch.nan, dtype=dtype, device=gpu).as_strided(
            cache.shape, strides
        )

    query, keys, values, *tables = inputs.tensors
    caches = [spread(cache).copy_(cache) for cache in (keys, values)]
    moved = Inputs((query, *caches, *tables), inputs.options)
    for criterion in (None, LOOSE):
        check(host, criterion, moved.call(decode_attention, criterion=criterion))


@pytest.mark.parametrize("stride", ["heads", "batch", "both", "expanded"])
def test_queries_of_any_strides(stride, gpu):
    case = Case("queries", LENS, 8, 2, head_dim=128, value_dim=128)
    host, inputs = build(case, torch.bfloat16, "cpu"), build(case, torch.bfloat16, gpu)
    query, *rest = inputs.tensors
    if stride == "heads":  # a slice of a fused projection with odd gaps
        query = torch.nn.functional.pad(query, (3, 2))[..., 3:131]
    elif stride == "batch":
        query = torch.nn.functional.pad(query, (0, 0, 0, 3))[:, :8]
    elif stride == "both":
        query = query.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    else:
        query = query[:1].expand(3, -1, -1)
        host_query = host.tensors[0][:1].expand(3, -1, -1)
        host = Inputs((host_query, *host.tensors[1:]), host.options)
    moved = Inputs((query, *rest), inputs.options)
    check(host, LOOSE, moved.call(decode_attention, criterion=LOOSE))


@pytest.mark.parametrize("elements", [1, 2, 4])
@pytest.mark.parametrize("dtype", HALVES, **by_dtype)
def test_append_from_and_to_anywhere(dtype, elements, gpu):
    g = torch.Generator().manual_seed(0)
    new = [torch.randn(9, 2, d, generator=g).to(device=gpu, dtype=dtype) for d in (64, 40)]
    slots = torch.tensor([3, 31, -1, 8, 0, 9, 10, 63, -1], device=gpu)
    for shift_new, shift_cache in ((elements, 0), (0, elements), (elements, elements)):
        ours, theirs = (
            [torch.zeros(4, 16, 2, d, dtype=dtype, device=gpu) for d in (64, 40)] for _ in range(2)
        )
        ours = [shifted(cache, shift_cache) for cache in ours]
        append_kv(*(shifted(tensor, shift_new) for tensor in new), *ours, slots)
        reference.append_kv(*new, *theirs, slots)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
