"""A few calls of every kind, small enough for compute-sanitizer.

    compute-sanitizer --tool racecheck python tests/cuda/reduced.py
    python tests/cuda/reduced.py --out-of-range      # indices that a caller should not pass

Results are compared with the reference, except for indices out of range, whose results are
undefined: there the process only has to survive.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import torch  # noqa: E402
from cases import LOOSE, Case, Inputs, build, empty_caches  # noqa: E402
from coded import call_guided, code_arguments, with_codes  # noqa: E402
from coded import check as check_walk  # noqa: E402
from contract import check  # noqa: E402
from gpu_helpers import call_split  # noqa: E402
from rests import with_true_rest  # noqa: E402

from art_torch import (  # noqa: E402
    ResidualMass,
    append_kv,
    decode_attention,
    encode_keys,
    guided_walk,
    reference,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
D128, D64, D96, D256 = ({"head_dim": d, "value_dim": d} for d in (128, 64, 96, 256))

# (case, dtype, criterion, thread blocks per item; 0: the schedule's choice)
CALLS = [
    (Case("one_block", (700, 90), 8, 2, **D128), BF16, LOOSE, 1),
    (Case("four_blocks", (1500, 130), 8, 2, **D128), BF16, None, 4),
    (Case("four_blocks_stop", (1500, 130), 8, 2, query_scale=6.0, **D128), BF16, LOOSE, 4),
    (Case("eight_blocks_stop", (2500,), 4, 1, walk="oldest_first", **D64), FP16, LOOSE, 8),
    (Case("ragged", (0, 1, 63, 65, 640), 16, 2, page_size=64, **D128), FP16, LOOSE, 0),
    (Case("many_heads", (300, 17), 32, 2, **D64), BF16, LOOSE, 2),
    (Case("wide_group", (300, 17), 40, 2, **D128), BF16, LOOSE, 2),
    (
        Case("explicit", (600, 333), 8, 2, walk="explicit", pinned="per_head", **D128),
        BF16,
        LOOSE,
        3,
    ),
    (
        Case(
            "everything",
            (500, 133),
            8,
            2,
            starts=(150, 20),
            sinks=True,
            alibi=True,
            options={"softcap": 20.0, "sliding_window": 300},
            **D96,
        ),
        FP16,
        LOOSE,
        2,
    ),
    (Case("large_rows", (200, 70), 6, 2, layout="hnd", page_size=32, **D256), BF16, LOOSE, 2),
    (Case("two_dims", (300, 17), 6, 2, head_dim=40, value_dim=72), BF16, LOOSE, 0),
    (Case("tokens_last", (300, 17), 8, 2, layout="tokens_last", **D128), BF16, LOOSE, 0),
    (Case("float32", (300, 17, 0), 6, 2), FP32, LOOSE, 0),
]


# (case, dtype): on tensor cores with one and two tiles of heads, and in plain arithmetic.
WALKS = [
    (Case("walk", (1500, 130, 0), 8, 2, **D128), BF16),
    (Case("walk_two_tiles", (700, 64), 24, 2, sinks=True, **D64), FP16),
    (
        Case("walk_everything", (600, 133), 8, 2, starts=(150, 20), alibi=True,
             options={"softcap": 20.0, "sliding_window": 300}, **D96),
        BF16,
    ),
    (Case("walk_large_rows", (300, 70), 6, 2, layout="hnd", page_size=32, **D256), BF16),
    (Case("walk_plain", (300, 17), 40, 2, head_dim=40, layout="tokens_last"), FP32),
]  # fmt: skip


# Where the criterion asks what a walk leaves; units are left out, or nobody may see them.
LISTED = {"walk": "explicit", "pinned": "per_head"}
RESTS = [
    (Case("rest", (600, 333, 0), 8, 2, starts=(150, 20, 0), **LISTED, **D128),
     BF16, ResidualMass(0.2), 1),
    (Case("rest_two_blocks", (600, 333), 24, 2, sinks=True, **LISTED, **D64),
     FP16, LOOSE | ResidualMass(0.1), 2),
    (Case("rest_four_blocks", (900, 333), 6, 2, starts=(150, 20), **LISTED, **D256),
     BF16, LOOSE & ResidualMass(0.3), 4),
    (Case("rest_plain", (300, 17), 40, 2, starts=(50, 3), **LISTED),
     FP32, LOOSE | ResidualMass(0.1), 0),
]  # fmt: skip


def run_calls(device: torch.device) -> None:
    for case, dtype, criterion, num_splits in CALLS:
        host, inputs = build(case, dtype, "cpu"), build(case, dtype, device)
        check(host, criterion, call_split(inputs, criterion, num_splits))
        options = {"criterion": criterion, "batch_invariant": True, "checked": False}
        check(host, criterion, inputs.call(decode_attention, **options))
        print(f"ok {case.name}", flush=True)


def run_rests(device: torch.device) -> None:
    for case, dtype, criterion, num_splits in RESTS:
        inputs = with_true_rest(build(case, dtype, device))
        check(inputs, criterion, call_split(inputs, criterion, num_splits))
        print(f"ok {case.name}", flush=True)


def run_appends(device: torch.device) -> None:
    slots = torch.tensor([3, 31, -1, 8])
    for layout, dtype in (("nhd", BF16), ("hnd", FP16), ("tokens_last", FP32), ("padded", BF16)):
        new = [torch.randn(4, 2, d, dtype=dtype) for d in (64, 40)]
        caches = [
            empty_caches(layout, 4, 8, 2, 64, 40, dtype=dtype, device=where)
            for where in ("cpu", device)
        ]
        for mapping in (slots, slots[:, None].repeat(1, 2)):
            reference.append_kv(*new, *caches[0], mapping)
            append_kv(*(t.to(device) for t in new), *caches[1], mapping.to(device))
        for ours, theirs in zip(caches[1], caches[0], strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0, equal_nan=True)
        print(f"ok append {layout}", flush=True)


def run_walks(device: torch.device) -> None:
    for case, dtype in WALKS:
        inputs = build(case, dtype, device)
        codes = with_codes(inputs)
        expected = with_codes(build(case, dtype, "cpu"))
        torch.testing.assert_close(codes[0].cpu(), expected[0], rtol=0, atol=0)
        check_walk(inputs, codes)
        print(f"ok {case.name}", flush=True)


def run_walks_out_of_range(device: torch.device) -> None:
    for dtype, dim in ((BF16, 128), (FP16, 64), (FP32, 40)):
        inputs = build(Case("bad", (500, 130), 8, 2, head_dim=dim), dtype, device)
        query, keys, values, table, lens = inputs.tensors
        pool, codes = code_arguments(inputs)
        capacity = table.shape[1] * 16
        changes = [{"seq_starts": torch.full_like(lens, -100)}]
        for page in (-1, 10**6, 2**31 - 1, -(2**31)):
            for name, ids in (("table", table), ("codes", codes)):
                bad = ids.clone()
                bad[:, ::3] = page
                changes.append({name: bad})
        for length in (capacity + 1, 10**6, 2**31 - 1, -1, -(2**31)):
            changes.append({"lens": torch.full_like(lens, length)})
            changes.append({"coded_lens": torch.full_like(lens, length)})
        for change in changes:
            tables = change.get("table", table), change.get("lens", lens)
            records = pool, change.get("codes", codes)
            coded = change.get("coded_lens")
            encode_keys(keys, *tables, *records, coded_lens=coded, checked=False)
            more = {k: v for k, v in change.items() if k == "seq_starts"}
            bad_inputs = Inputs((query, keys, values, *tables), more)
            call_guided(functools.partial(guided_walk, checked=False), bad_inputs, records)
            if device.type == "cuda":
                torch.cuda.synchronize()
        print(f"ok walks {dtype} {dim}: {len(changes)} bad calls", flush=True)


def run_out_of_range(device: torch.device) -> None:
    """Page ids, lengths, walk entries and slots that a checked call would refuse."""
    for dtype, dim in ((BF16, 128), (FP16, 64), (FP32, 64), (BF16, 40)):
        for walk in ("sink_recent", "explicit"):
            case = Case("bad", (500, 130), 8, 2, walk=walk, head_dim=dim, value_dim=dim)
            query, keys, values, table, lens = build(case, dtype, device).tensors
            options = build(case, dtype, device).options
            pages = keys.shape[0]
            tables = [table.clone() for _ in range(5)]
            for bad, page in zip(tables, (-1, pages, 2**31 - 1, -(2**31), pages + 7), strict=True):
                bad[:, ::3] = page
            changes = [{"block_table": bad} for bad in tables]
            capacity = table.shape[1] * 16
            for length in (capacity + 1, 10**6, 2**31 - 1, -1, -(2**31)):
                changes.append({"seq_lens": torch.full_like(lens, length)})
            changes.append({"seq_starts": torch.full_like(lens, -100)})
            if walk == "explicit":
                units = capacity // 16
                for entry in (units, units + 5, 10**6, -1, -(10**6)):
                    changes.append({"walk": torch.where(options["walk"] % 3 == 0, entry,
                                                        options["walk"]).int()})  # fmt: skip
                pinned = torch.full_like(options["walk_lens"], -2)
                changes.append({"num_pinned": pinned})
                for length in (units + 1, 2**31 - 1, -1):
                    changes.append({"walk_lens": torch.full_like(options["walk_lens"], length)})
            for change in changes:
                tensors = (query, keys, values, change.get("block_table", table),
                           change.get("seq_lens", lens))  # fmt: skip
                more = {k: v for k, v in change.items() if k not in ("block_table", "seq_lens")}
                inputs = Inputs(tensors, {**options, **more, "checked": False})
                for num_splits in (0, 1, 4):
                    call_split(inputs, LOOSE, num_splits)
                    if walk == "explicit":
                        rest = torch.zeros(*query.shape[:2], options["walk"].shape[2]).to(device)
                        call_split(inputs, ResidualMass(0.1), num_splits, log_rest=rest)
                torch.cuda.synchronize()
            print(f"ok {dtype} {dim} {walk}: {len(changes)} bad calls", flush=True)
    new, cache = torch.ones(4, 2, 64, device=device), torch.zeros(3, 8, 2, 64, device=device)
    slots = torch.tensor([24, -2, 2**62, -(2**62)], device=device)
    append_kv(new, new, cache, cache.clone(), slots)
    assert cache.count_nonzero() == 0
    print("ok append", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out-of-range", action="store_true")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.out_of_range:
        run_out_of_range(device)
        run_walks_out_of_range(device)
    else:
        run_calls(device)
        run_rests(device)
        run_appends(device)
        run_walks(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("all calls done")


if __name__ == "__main__":
    main()
