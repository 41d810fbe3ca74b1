"""Inputs of the operator tests: what a case is, its layout in memory, and the table of cases."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch

from art_torch import Stability, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CACHE_DTYPES = (*DTYPES, torch.int8)  # for `build`
GARBAGE_PAGE = 2**31 - 1  # in block tables, where no page is ever looked up


@dataclass(frozen=True)
class Case:
    """One call of `decode_attention`.

    `value_mean` is a common part of all values, as models have it: it lets outputs settle. The
    larger `query_scale`, the more the softmax mass sits on few tokens.
    """

    name: str
    seq_lens: tuple  # of ints, or of one tuple of ints per sequence for per-head lengths
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    value_dim: int = 64
    page_size: int = 16
    layout: str = "nhd"
    per_head_table: bool = False
    query_scale: float = 2.0
    value_mean: float = 1.0
    starts: tuple | None = None
    sinks: bool = False
    alibi: bool = False
    walk: str = "sink_recent"  # or "explicit": random units, some left out, some invisible
    pinned: int | str | None = None  # or "per_head"
    options: dict = field(default_factory=dict)  # passed on

    @property
    def per_head_lens(self):
        return isinstance(self.seq_lens[0], tuple)


@dataclass
class Inputs:
    """What a case becomes: `decode_attention(*tensors, **options)`."""

    tensors: tuple
    options: dict

    def call(self, function, **changes):
        return function(*self.tensors, **{**self.options, **changes})

    @property
    def dtype(self):
        return self.tensors[0].dtype

    @property
    def caches(self):
        """Keys and values as numbers."""
        scales = (self.options.get("key_scale"), self.options.get("value_scale"))
        return [
            cache if scale is None else reference.dequantize(cache, scale)
            for cache, scale in zip(self.tensors[1:3], scales, strict=True)
        ]

    def to(self, device):
        """The same call on another device; caches may get another layout there."""
        options = {
            k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.options.items()
        }
        return Inputs(tuple(t.to(device) for t in self.tensors), options)

    def select(self, rows):
        """The same call for some sequences of the batch."""
        rows = torch.tensor(rows, dtype=torch.long)
        query, keys, values, *tables = self.tensors
        per_batch = ("seq_starts", "walk", "walk_lens", "num_pinned", "log_rest")
        options = {
            k: v[rows].clone() if k in per_batch and isinstance(v, torch.Tensor) else v
            for k, v in self.options.items()
        }
        return Inputs((query[rows], keys, values, *(t[rows] for t in tables)), options)


def empty_caches(layout, num_pages, page_size, num_kv_heads, head_dim, value_dim, **options):
    """Key and value caches full of NaN with the strides of a layout."""

    def full(*shape):
        return torch.full(shape, math.nan, **options)

    p, n, h = num_pages, page_size, num_kv_heads
    if layout == "nhd":
        return full(p, n, h, head_dim), full(p, n, h, value_dim)
    if layout == "hnd":
        return full(p, h, n, head_dim).transpose(1, 2), full(p, h, n, value_dim).transpose(1, 2)
    if layout == "interleaved_tokens":
        return full(p, n, h, head_dim + value_dim).split([head_dim, value_dim], dim=-1)
    if layout == "interleaved_pages":
        assert head_dim == value_dim
        return full(p, 2, n, h, head_dim).unbind(1)
    if layout == "padded":  # rows that are not next to each other, and do not start at the buffer
        pool = full(p, n, h, head_dim + value_dim + 24)
        return pool[..., 8 : 8 + head_dim], pool[..., 16 + head_dim : 16 + head_dim + value_dim]
    if layout == "tokens_last":
        return full(p, h, head_dim, n).permute(0, 3, 1, 2), full(p, n, h, value_dim)
    if layout == "head_pool":  # one pool for all heads: page ids differ by head
        pools = full(p, n, 1, head_dim), full(p, n, 1, value_dim)
        return tuple(pool.expand(-1, -1, h, -1) for pool in pools)
    raise ValueError(layout)


def build(case, dtype, device="cpu", seed=0, query_dtype=torch.float32):
    """Random inputs of a case; tokens that may not be read are NaN, such page ids are garbage.

    `dtype` is that of all tensors, or int8: of caches, for a query of `query_dtype`.
    """
    if dtype == torch.int8:
        if torch.device(device).type != "cpu":
            pytest.skip("int8 caches run on the CPU")
        return quantized(build(case, query_dtype, device, seed))
    g = torch.Generator().manual_seed(seed)
    batch, h = len(case.seq_lens), case.num_kv_heads
    lens = torch.tensor(case.seq_lens, dtype=torch.int32)
    lens_of = lens if case.per_head_lens else lens[:, None].expand(-1, h)
    kind = {"dtype": dtype, "device": device}
    options = {"walk": case.walk, **_logit_options(case, g), **case.options}
    unit = options.get("unit_size", 16)
    max_pages = -(-int(lens.max()) // case.page_size) + 1 if batch else 1
    if case.layout == "dense":
        # A [B, Hkv, S, D] cache seen as one page a sequence.
        page_size, max_pages = int(lens.max()) + 5, 1
        caches = empty_caches("hnd", batch, page_size, h, case.head_dim, case.value_dim, **kind)
        table = torch.arange(batch, dtype=torch.int32)[:, None]
    else:
        page_size = case.page_size
        per_head = case.per_head_table or case.layout == "head_pool"
        shape = (batch, h, max_pages) if per_head else (batch, max_pages)
        num_pages = math.prod(shape) + 2
        caches = empty_caches(
            case.layout, num_pages, page_size, h, case.head_dim, case.value_dim, **kind
        )
        table = torch.randperm(num_pages, generator=g)[: num_pages - 2].view(shape).int()
    if case.walk == "explicit":
        options |= _random_walk(max_pages * page_size, unit, batch, h, g)
    options |= _pinned(case, batch, g)

    query = case.query_scale * torch.randn(batch, case.num_q_heads, case.head_dim, generator=g)
    window = options.get("sliding_window") or 2**31
    for b in range(batch):
        used = torch.zeros(max_pages, dtype=torch.bool)
        for head in range(h):
            seq_len = int(lens_of[b, head])
            start = max(case.starts[b] if case.starts else 0, seq_len - window)
            tokens = torch.arange(start, max(start, seq_len))
            used[tokens // page_size] = True
            row = table[b] if table.ndim == 2 else table[b, head]
            if case.walk == "explicit":
                listed = options["walk"][b, head, : options["walk_lens"][b, head]]
                tokens = tokens[torch.isin(tokens // unit, listed)]
            pages, slots = row[tokens // page_size].long(), tokens % page_size
            noise = torch.randn(len(tokens), case.head_dim + case.value_dim, generator=g)
            key, value = noise.split([case.head_dim, case.value_dim], dim=-1)
            caches[0][:, :, head][pages, slots] = key.to(**kind)
            caches[1][:, :, head][pages, slots] = (value + case.value_mean).to(**kind)
            if table.ndim == 3:
                unused = torch.ones(max_pages, dtype=torch.bool)
                unused[torch.arange(start, max(start, seq_len)) // page_size] = False
                row[unused] = GARBAGE_PAGE
        if table.ndim == 2:
            table[b, ~used] = GARBAGE_PAGE
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    tensors = (query.to(dtype), *caches, table, lens)
    return Inputs(tuple(t.to(device) for t in tensors), options)


def quantized(inputs):
    """The same call with int8 caches of the same layout; what was NaN has the scale NaN."""
    query, *caches, table, lens = inputs.tensors
    codes, scales = zip(*map(_quantized_cache, caches), strict=True)
    options = {**inputs.options, "key_scale": scales[0], "value_scale": scales[1]}
    return Inputs((query, *codes, table, lens), options)


def _quantized_cache(cache):
    if cache.stride(2) == 0 and cache.shape[2] > 1:  # one pool for all heads
        codes, scale = _quantized_cache(cache[:, :, :1])
        return codes.expand(cache.shape), scale.expand(cache.shape[:3])
    memory = torch.zeros(cache.untyped_storage().nbytes() // cache.itemsize, dtype=torch.int8)
    codes = memory.as_strided(cache.shape, cache.stride(), cache.storage_offset())
    new, scale = reference.quantize(cache)
    codes.copy_(new)
    if cache.stride(2) > cache.stride(1):  # the tokens of a head are adjacent
        scale = scale.transpose(1, 2).contiguous().transpose(1, 2)
    return codes, scale


def _logit_options(case, g):
    options = {}
    if case.starts is not None:
        options["seq_starts"] = torch.tensor(case.starts, dtype=torch.int32)
    if case.sinks:
        options["attn_sinks"] = 2 * torch.randn(case.num_q_heads, generator=g)
    if case.alibi:
        options["alibi_slopes"] = 2.0 ** -torch.linspace(3, 8, case.num_q_heads)
    return options


def _random_walk(capacity, unit, batch, num_kv_heads, g):
    num_units = -(-capacity // unit)
    walk = torch.stack(
        [torch.randperm(num_units, generator=g) for _ in range(batch * num_kv_heads)]
    ).view(batch, num_kv_heads, num_units)
    lens = torch.randint(num_units // 2, num_units + 1, (batch, num_kv_heads), generator=g)
    walk[torch.arange(num_units) >= lens[..., None]] = -5  # never looked at
    return {"walk": walk.int(), "walk_lens": lens.int()}


def _pinned(case, batch, g):
    if case.pinned == "per_head":
        shape = (batch, case.num_kv_heads)
        return {"num_pinned": torch.randint(0, 7, shape, generator=g, dtype=torch.int32)}
    return {"num_pinned": case.pinned}


EDGES = (0, 1, 15, 16, 17, 63, 64, 65)
BASE = Case("base", (1000, 333))
LOOSE = Stability(0.1, 5e-3, 2)


def _heads(q, kv):
    return replace(BASE, name=f"gqa_{q}_{kv}", num_q_heads=q, num_kv_heads=kv)


def _dims(dim, value_dim):
    return replace(BASE, name=f"dims_{dim}_{value_dim}", head_dim=dim, value_dim=value_dim)


def _with(name, **changes):
    options = changes.pop("options", {})
    known = {k: changes.pop(k) for k in list(changes) if k in Case.__dataclass_fields__}
    return replace(BASE, name=name, **known, options={**changes, **options})


# Every case runs with `criterion=None` and with a criterion, in every dtype.
CASES = [
    *(_with(f"length_{n}", seq_lens=(n,)) for n in (*EDGES, 1000, 4097)),
    _with("ragged", seq_lens=(*EDGES, 1000, 129)),
    _with("ragged_long", seq_lens=(3, 4097, 0, 700), num_q_heads=3, num_kv_heads=1),
    _with("page_8_unit_8", page_size=8, unit_size=8),
    *(_with(f"page_{n}", page_size=n) for n in (64, 128, 256)),
    *(_heads(*heads)
      for heads in ((2, 2), (3, 1), (5, 1), (10, 2), (7, 1), (8, 1), (16, 1), (9, 3))),
    *(_dims(d, d) for d in (32, 40, 80, 96, 128, 192, 256)),
    *(_dims(*d) for d in ((40, 32), (64, 128), (192, 128), (72, 248), (256, 32))),
    *(_with(f"layout_{layout}", layout=layout, page_size=32)
      for layout in ("hnd", "interleaved_tokens", "interleaved_pages", "padded", "dense",
                     "tokens_last", "head_pool")),
    _with("tokens_last_dims", layout="tokens_last", head_dim=40, value_dim=80, num_q_heads=6),
    *(_with(f"tokens_last_page_{n}", layout="tokens_last", page_size=n, starts=(37, 300))
      for n in (16, 64, 128)),
    _with("tokens_last_page_20", layout="tokens_last", page_size=20, unit_size=4, block_size=12,
          num_q_heads=7, num_kv_heads=1),
    _with("tokens_last_explicit", layout="tokens_last", page_size=64, walk="explicit"),
    _with("dense_any_unit", layout="dense", unit_size=24, block_size=72),
    _with("dense_one_unit", layout="dense", unit_size=5000, block_size=5000),
    _with("per_head_table", per_head_table=True),
    _with("per_head_lens", seq_lens=((700, 20), (0, 333), (64, 1))),
    _with("head_pool_lens", seq_lens=((700, 20), (0, 333)), layout="head_pool"),
    _with("softcap", softcap=5.0),
    _with("sinks", sinks=True),
    _with("sinks_empty", seq_lens=(0, 65), sinks=True),
    _with("window", sliding_window=250),
    _with("window_1", sliding_window=1),
    _with("window_beyond", sliding_window=5000),
    _with("alibi", alibi=True),
    _with("starts", starts=(37, 300)),
    _with("starts_at_the_end", starts=(999, 333)),
    _with("scale", scale=0.3, query_scale=1.0),
    _with("scale_negative", scale=-0.125),
    _with("everything", sinks=True, alibi=True, softcap=20.0, sliding_window=900, starts=(150, 20)),
    *(_with(walk, walk=walk) for walk in ("oldest_first", "recent_first")),
    *(_with(f"{walk}_all", walk=walk, sinks=True, sliding_window=900, starts=(150, 20))
      for walk in ("oldest_first", "recent_first")),
    _with("explicit", walk="explicit"),
    _with("explicit_pinned", walk="explicit", pinned=5),
    _with("explicit_per_head", walk="explicit", pinned="per_head", per_head_table=True,
          seq_lens=((700, 20), (1, 333))),
    _with("explicit_invisible", walk="explicit", pinned="per_head", sliding_window=300,
          seq_lens=(1000, 333, 90)),
    _with("explicit_dense", walk="explicit", layout="dense", unit_size=24, block_size=48),
    *(_with(f"pinned_{n}", pinned=n, walk="recent_first") for n in (0, 3, "per_head")),
    _with("pinned_none", pinned=0),
    _with("pinned_all", pinned=10**6),
    _with("block_16", block_size=16),
    _with("block_128", block_size=128),
    _with("block_4096", block_size=4096),
    _with("unit_8", unit_size=8),
    _with("unit_4_block_12", unit_size=4, block_size=12),
    _with("unit_64", page_size=64, unit_size=64),
]  # fmt: skip

CRITERIA = [
    LOOSE,
    Stability(),
    Stability.paper(),
    Stability(0.3, 0.05, 1),
    Stability(torch.tensor([0.2, 0.05]), torch.tensor([0.02, 2e-3]), 2),
    Stability(0.1, torch.tensor([5e-3, 5e-4]), 3),
]

PLANE = {"walk": "oldest_first", "unit_size": 1, "block_size": 1}


def plane_cache(points, dtype=torch.float32, copies=1):
    """`copies` tokens a point, all logits 0: token t has the value (x_t, y_t, 0, ...)."""
    points = torch.tensor(points, dtype=dtype).repeat_interleave(copies, 0)
    values = torch.zeros(1, len(points), 1, 32, dtype=dtype)
    values[0, :, 0, :2] = points
    tables = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([len(points)], dtype=torch.int32)
    return torch.zeros(1, 1, 32).to(dtype), torch.zeros_like(values), values, *tables
