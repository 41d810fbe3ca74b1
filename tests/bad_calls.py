"""Calls of decode attention with one bad argument, and what the error has to say about it."""

import math

import torch

from art_torch import ResidualMass, Stability

BATCH, HQ, HKV, DIM, PAGES, PAGE = 2, 4, 2, 32, 9, 16


def arguments(device="cpu"):
    """A valid call: two sequences of 40 and 20 tokens in pages of 16."""
    g = torch.Generator().manual_seed(0)
    given = {
        "query": torch.randn(BATCH, HQ, DIM, generator=g),
        "key_cache": torch.randn(PAGES, PAGE, HKV, DIM, generator=g),
        "value_cache": torch.randn(PAGES, PAGE, HKV, DIM, generator=g),
        "block_table": torch.tensor([[3, 1, 2], [4, 5, 0]], dtype=torch.int32),
        "seq_lens": torch.tensor([40, 20], dtype=torch.int32),
    }
    return {name: tensor.to(device) for name, tensor in given.items()}


def moved(changes, device):
    """The same on a device; `Tensor.to` would give a strided tensor other strides."""
    return {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
        if isinstance(x, torch.Tensor)
        else x
        for name, x in changes.items()
    }


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def explicit(entries, lens=((2, 2), (2, 2)), **more):
    return {
        "walk": torch.tensor(entries, dtype=torch.int32),
        "walk_lens": torch.tensor(lens, dtype=torch.int32),
        **more,
    }


def heads_of_dim(dim, value_dim=DIM):
    return {
        "query": torch.zeros(BATCH, HQ, dim),
        "key_cache": torch.zeros(PAGES, PAGE, HKV, dim),
        "value_cache": torch.zeros(PAGES, PAGE, HKV, value_dim),
    }


GOOD_WALK = [[[0, 1], [2, 0]], [[0, 1], [1, 0]]]
PER_HEAD_LENS = torch.tensor([[40, 3], [20, 0]], dtype=torch.int32)

OF_8 = "must be a multiple of 8 from 32 to 256"

# name: (changed arguments, exception, words of the message: the argument and what came)
BAD = {
    "query_rank": ({"query": torch.zeros(BATCH, DIM)}, ValueError, "query must", "got [2, 32]"),
    "key_rank": (
        {"key_cache": torch.zeros(PAGES, PAGE, DIM)}, ValueError, "key_cache must", "[9, 16, 32]",
    ),
    "value_rank": (
        {"value_cache": torch.zeros(PAGES, DIM)}, ValueError, "value_cache must", "got [9, 32]",
    ),
    "table_rank_1": ({"block_table": int32(3, 1, 2)}, ValueError, "block_table must", "got [3]"),
    "table_rank_4": (
        {"block_table": int32([[[3, 1, 2]]])}, ValueError, "block_table must", "got [1, 1, 1, 3]",
    ),
    "table_batch": ({"block_table": int32([3, 1, 2])}, ValueError, "block_table must", "[1, 3]"),
    "table_heads": (
        {"block_table": torch.zeros(BATCH, HKV + 1, 3, dtype=torch.int32)},
        ValueError,
        "block_table must",
        "got [2, 3, 3]",
    ),
    "lens_rank": ({"seq_lens": int32([[40]])}, ValueError, "seq_lens must", "got [1, 1, 1]"),
    "lens_scalar": (
        {"seq_lens": torch.tensor(40, dtype=torch.int32)}, ValueError, "seq_lens must", "got []",
    ),
    "lens_batch": ({"seq_lens": int32(40, 20, 1)}, ValueError, "seq_lens must", "got [3]"),
    "lens_heads": (
        {"seq_lens": int32([40, 1, 1], [2, 2, 2])}, ValueError, "seq_lens must", "got [2, 3]",
    ),
    "starts_shape": ({"seq_starts": int32([0, 0])}, ValueError, "seq_starts must", "got [1, 2]"),
    "query_integer": (
        {"query": torch.zeros(BATCH, HQ, DIM).int()}, TypeError, "query must", "int32",
    ),
    "key_dtype": (
        {"key_cache": torch.zeros(PAGES, PAGE, HKV, DIM).half()},
        TypeError,
        "key_cache must",
        "float16",
    ),
    "value_dtype": (
        {"value_cache": torch.zeros(PAGES, PAGE, HKV, DIM).bfloat16()},
        TypeError,
        "value_cache must",
        "bfloat16",
    ),
    "table_int64": (
        {"block_table": torch.zeros(BATCH, 3).long()}, TypeError, "block_table must", "int64",
    ),
    "table_float": (
        {"block_table": torch.zeros(BATCH, 3)}, TypeError, "block_table must", "float32",
    ),
    "lens_int64": ({"seq_lens": torch.tensor([40, 20])}, TypeError, "seq_lens must", "int64"),
    "starts_int64": ({"seq_starts": torch.tensor([0, 0])}, TypeError, "seq_starts must", "int64"),
    "walk_int64": (
        {"walk": torch.zeros(BATCH, HKV, 2).long(), "walk_lens": PER_HEAD_LENS * 0},
        TypeError,
        "walk must",
        "int64",
    ),
    "walk_lens_int64": (
        explicit(GOOD_WALK) | {"walk_lens": torch.ones(2, 2).long()},
        TypeError,
        "walk_lens must",
        "int64",
    ),
    "pinned_int64": (
        {"num_pinned": torch.zeros(BATCH, HKV).long()}, TypeError, "num_pinned", "int64",
    ),
    "pages_negative": (
        {"block_table": int32([3, -1, 2], [4, 5, 0])}, ValueError, "block_table must", "got -1",
    ),
    "pages_too_large": (
        {"block_table": int32([3, 1, 2], [4, 9, 0])}, ValueError, "block_table must", "got 9",
    ),
    "lens_beyond_table": ({"seq_lens": int32(49, 20)}, ValueError, "seq_lens must", "got 49"),
    "lens_negative": ({"seq_lens": int32(40, -1)}, ValueError, "seq_lens must", "got -1"),
    "lens_beyond_table_per_head": (
        {"seq_lens": int32([40, 20], [20, 60])}, ValueError, "seq_lens must", "got 60",
    ),
    "starts_negative": ({"seq_starts": int32(0, -3)}, ValueError, "seq_starts must", "got -3"),
    "heads_not_a_multiple": (
        {"query": torch.zeros(BATCH, 5, DIM)}, ValueError, "multiple of", "got 5 and 2",
    ),
    "heads_fewer": (
        {"query": torch.zeros(BATCH, 1, DIM)}, ValueError, "multiple of", "got 1 and 2",
    ),
    "dims_differ": ({"query": torch.zeros(BATCH, HQ, 40)}, ValueError, "key_cache must", "40"),
    "dim_36": (heads_of_dim(36), ValueError, OF_8, "got 36"),
    "dim_24": (heads_of_dim(24), ValueError, OF_8, "got 24"),
    "dim_264": (heads_of_dim(264), ValueError, OF_8, "got 264"),
    "dim_mla": (heads_of_dim(576, 512), ValueError, OF_8, "576"),
    "value_dim_0": (heads_of_dim(64, 0), ValueError, "value", OF_8, "got 0"),
    "value_dim_36": (heads_of_dim(64, 36), ValueError, "value", OF_8, "got 36"),
    "value_pages": (
        {"value_cache": torch.zeros(PAGES - 1, PAGE, HKV, DIM)},
        ValueError,
        "value_cache must",
        "got [8, 16, 2, 32]",
    ),
    "value_heads": (
        {"value_cache": torch.zeros(PAGES, PAGE, 1, DIM)},
        ValueError,
        "value_cache must",
        "got [9, 16, 1, 32]",
    ),
    "value_page_size": (
        {"value_cache": torch.zeros(PAGES, 8, HKV, DIM)},
        ValueError,
        "value_cache must",
        "got [9, 8, 2, 32]",
    ),
    "unit_zero": ({"unit_size": 0}, ValueError, "unit_size must be at least 1", "got 0"),
    "unit_negative": ({"unit_size": -16}, ValueError, "unit_size must be at least 1", "got -16"),
    "unit_not_dividing_page": (
        {"unit_size": 12, "block_size": 24}, ValueError, "unit_size must divide", "got 12",
    ),
    "block_not_a_multiple": ({"block_size": 40}, ValueError, "block_size must", "got 40"),
    "block_zero": ({"block_size": 0}, ValueError, "block_size must", "got 0"),
    "block_below_unit": ({"block_size": 8}, ValueError, "block_size must", "got 8"),
    "walk_name": ({"walk": "newest"}, ValueError, "walk must", "got 'newest'"),
    "walk_without_lens": ({"walk": torch.zeros(BATCH, HKV, 2).int()}, ValueError, "walk_lens"),
    "lens_without_walk": ({"walk_lens": PER_HEAD_LENS}, ValueError, "walk_lens"),
    "walk_rank": (explicit([[0, 1], [1, 0]]), ValueError, "walk must", "got [2, 2]"),
    "walk_heads": (explicit([[[0, 1]], [[1, 0]]]), ValueError, "walk must", "got [2, 1, 2]"),
    "walk_lens_shape": (explicit(GOOD_WALK, (2, 2)), ValueError, "walk_lens must", "got [2]"),
    "walk_lens_too_large": (
        explicit(GOOD_WALK, ((2, 2), (3, 2))), ValueError, "walk_lens must", "got 3",
    ),
    "walk_lens_negative": (
        explicit(GOOD_WALK, ((2, 2), (-2, 2))), ValueError, "walk_lens must", "got -2",
    ),
    "walk_negative": (
        explicit([[[0, -4], [2, 0]], [[0, 1], [1, 0]]]), ValueError, "walk", "from 0 to 2, got -4",
    ),
    "walk_too_large": (
        explicit([[[0, 1], [2, 0]], [[0, 1], [3, 0]]]), ValueError, "walk", "from 0 to 2, got 3",
    ),
    "walk_twice": (
        explicit([[[0, 1], [2, 0]], [[1, 1], [1, 0]]], checked=True),
        ValueError,
        "walk must",
        " a unit ",
    ),
    "pinned_negative": ({"num_pinned": -1}, ValueError, "num_pinned must", "got -1"),
    "pinned_negative_per_head": (
        {"num_pinned": int32([0, 1], [0, -2])}, ValueError, "num_pinned", "got -2",
    ),
    "pinned_shape": ({"num_pinned": int32(1, 2)}, ValueError, "num_pinned", "got [2]"),
    "scale_nan": ({"scale": math.nan}, ValueError, "scale must", "got nan"),
    "scale_infinite": ({"scale": math.inf}, ValueError, "scale must", "got inf"),
    "softcap_negative": ({"softcap": -1.0}, ValueError, "softcap must", "got -1"),
    "softcap_nan": ({"softcap": math.nan}, ValueError, "softcap must", "got nan"),
    "window_zero": ({"sliding_window": 0}, ValueError, "sliding_window must", "got 0"),
    "window_negative": ({"sliding_window": -5}, ValueError, "sliding_window must", "got -5"),
    "window_per_head": (
        {"sliding_window": 5, "seq_lens": PER_HEAD_LENS}, ValueError, "sliding_window", "seq_lens",
    ),
    "alibi_per_head": (
        {"alibi_slopes": torch.ones(HQ), "seq_lens": PER_HEAD_LENS},
        ValueError,
        "alibi_slopes",
        "seq_lens",
    ),
    "alibi_shape": ({"alibi_slopes": torch.ones(HKV)}, ValueError, "alibi_slopes must", "got [2]"),
    "sinks_shape": (
        {"attn_sinks": torch.ones(BATCH, HQ)}, ValueError, "attn_sinks must", "got [2, 4]",
    ),
    "limits_shape": (
        {"criterion": Stability(torch.ones(3), 0.1)}, ValueError, "d_scale must", "got [3]",
    ),
    "criterion_type": ({"criterion": 0.03}, TypeError, "criterion must", "got float"),
    "rest_of_a_name": (
        {"criterion": ResidualMass(0.1)}, ValueError, "ResidualMass", "got walk='sink_recent'",
    ),
    "rest_missing": (
        explicit(GOOD_WALK, criterion=ResidualMass(0.1)), ValueError, "needs log_rest", "got None",
    ),
    "rest_shape": (
        explicit(GOOD_WALK, criterion=ResidualMass(0.1), log_rest=torch.zeros(BATCH, HKV, 2)),
        ValueError,
        "log_rest must",
        "got [2, 2, 2]",
    ),
    "rest_units": (
        explicit(GOOD_WALK, criterion=ResidualMass(0.1), log_rest=torch.zeros(BATCH, HQ, 3)),
        ValueError,
        "log_rest must",
        "got [2, 4, 3]",
    ),
    "rest_without_criterion": (
        explicit(GOOD_WALK, log_rest=torch.zeros(BATCH, HQ, 2)),
        ValueError,
        "log_rest",
        "ResidualMass",
    ),
    "rest_of_stability": (
        explicit(GOOD_WALK, criterion=Stability(), log_rest=torch.zeros(BATCH, HQ, 2)),
        ValueError,
        "log_rest",
        "ResidualMass",
    ),
}  # fmt: skip
# What the reference does not have, or does not care about.
REFUSED = (TypeError, ValueError, RuntimeError)
BAD_FOR_OPERATORS = {
    "query_float64": (
        {k: v.double() for k, v in heads_of_dim(DIM).items()},
        TypeError,
        "query must",
        "got float64",
    ),
    "query_strided": (
        {"query": torch.zeros(BATCH, HQ, 2 * DIM)[..., ::2]},
        ValueError,
        "last dimension of query must be contiguous",
    ),
    "key_strided": (
        {"key_cache": torch.zeros(PAGES, PAGE, HKV, 2 * DIM)[..., ::2]},
        ValueError,
        "dimension of key_cache must be contiguous",
    ),
    "value_strided": (
        {"value_cache": torch.zeros(PAGES, HKV, DIM, PAGE).permute(0, 3, 1, 2)},
        ValueError,
        "last dimension of value_cache must be contiguous",
    ),
    "walk_type": ({"walk": 3}, TypeError, "walk must be a name or an int32 tensor", "got int"),
    "query_type": ({"query": [1.0]}, REFUSED, "query must be a tensor", "got list"),
    "query_none": ({"query": None}, REFUSED, "query must be a tensor", "got NoneType"),
}
