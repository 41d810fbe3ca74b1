"""Bad input on a GPU: refused at once, found in checked mode, or harmless."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Case, build
from contract import assert_refused

from art_torch import DecodeResult, Stability, append_kv, decode_attention

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def int32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def decode_arguments(device):
    """A valid call with every optional tensor, two sequences of 40 and 20 tokens."""
    return {
        "query": torch.zeros(2, 4, 64, device=device),
        "key_cache": torch.zeros(9, 16, 2, 64, device=device),
        "value_cache": torch.zeros(9, 16, 2, 64, device=device),
        "block_table": int32([[3, 1, 2], [4, 5, 0]], device),
        "seq_lens": int32([40, 20], device),
        "seq_starts": int32([0, 3], device),
        "walk": int32([[[0, 1], [2, 0]], [[0, 1], [1, 0]]], device),
        "walk_lens": int32([[2, 2], [2, 2]], device),
        "num_pinned": int32([[0, 1], [1, 0]], device),
        "attn_sinks": torch.zeros(4, device=device),
        "alibi_slopes": torch.zeros(4, device=device),
    }


def append_arguments(device):
    return {
        "key": torch.zeros(3, 2, 32, device=device),
        "value": torch.zeros(3, 2, 40, device=device),
        "key_cache": torch.zeros(9, 16, 2, 32, device=device),
        "value_cache": torch.zeros(9, 16, 2, 40, device=device),
        "slot_mapping": torch.tensor([5, -1, 143], device=device),
    }


REFUSED = (TypeError, ValueError, RuntimeError)


@pytest.mark.parametrize("name", decode_arguments("cpu"))
def test_one_argument_on_the_cpu(name, gpu):
    given = decode_arguments(gpu)
    decode_attention(**given)
    assert_refused(decode_attention, given | {name: given[name].cpu()}, REFUSED, "device")


@pytest.mark.parametrize("name", decode_arguments("cpu"))
def test_one_argument_on_the_gpu(name, gpu):
    given = decode_arguments("cpu")
    assert_refused(decode_attention, given | {name: given[name].to(gpu)}, REFUSED, "device")


@pytest.mark.parametrize("name", append_arguments("cpu"))
def test_append_on_two_devices(name, gpu):
    given = append_arguments(gpu)
    append_kv(**given)
    assert_refused(append_kv, given | {name: given[name].cpu()}, REFUSED, "device")
    given = append_arguments("cpu")
    assert_refused(append_kv, given | {name: given[name].to(gpu)}, REFUSED, "device")


@pytest.mark.parametrize("field", DecodeResult._fields)
def test_results_on_the_cpu(field, gpu):
    given = decode_arguments(gpu)
    good = decode_attention(**given)
    given["out"] = good._replace(**{field: getattr(good, field).cpu()})
    assert_refused(decode_attention, given, REFUSED, "device")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8, torch.int32])
def test_dtypes_that_have_no_kernel(dtype, gpu):
    given = decode_arguments(gpu)
    for name in ("query", "key_cache", "value_cache"):
        given[name] = given[name].to(dtype)
    assert_refused(decode_attention, given, TypeError, "dtype of query must be float32, float16")


@pytest.mark.parametrize("dim", [24, 36, 264, 576])
def test_head_dims_that_have_no_kernel(dim, gpu):
    given = decode_arguments(gpu)
    for name in ("query", "key_cache", "value_cache"):
        given[name] = torch.zeros(*given[name].shape[:-1], dim, device=gpu)
    assert_refused(decode_attention, given, ValueError, f"{dim}")


BAD_VALUES = {
    "page_negative": ({"block_table": [[3, -1, 2], [4, 5, 0]]}, "-1"),
    "page_too_large": ({"block_table": [[3, 1, 2], [4, 9, 0]]}, "9"),
    "page_huge": ({"block_table": [[3, 1, 2**31 - 1], [4, 5, 0]]}, str(2**31 - 1)),
    "length_too_large": ({"seq_lens": [49, 20]}, "49"),
    "length_negative": ({"seq_lens": [40, -1]}, "-1"),
    "start_negative": ({"seq_starts": [0, -3]}, "-3"),
    "unit_too_large": ({"walk": [[[0, 1], [2, 0]], [[0, 1], [3, 0]]]}, "3"),
    "unit_negative": ({"walk": [[[0, -4], [2, 0]], [[0, 1], [1, 0]]]}, "-4"),
    "unit_twice": ({"walk": [[[0, 1], [2, 0]], [[1, 1], [1, 0]]]}, "twice"),
    "walk_too_long": ({"walk_lens": [[2, 2], [3, 2]]}, "3"),
    "walk_negative": ({"walk_lens": [[2, 2], [-2, 2]]}, "-2"),
    "pinned_negative": ({"num_pinned": [[0, 1], [0, -2]]}, "-2"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_checked_mode_finds(name, gpu, monkeypatch):
    changes, words = BAD_VALUES[name]
    given = decode_arguments(gpu) | {k: int32(v, gpu) for k, v in changes.items()}
    for dtype in (torch.float32, torch.bfloat16):
        for tensor in ("query", "key_cache", "value_cache"):
            given[tensor] = given[tensor].to(dtype)
        assert_refused(decode_attention, given | {"checked": True}, ValueError, words)
        monkeypatch.setenv("ART_CHECKED", "1")
        assert_refused(decode_attention, given, ValueError, words)
        assert_refused(decode_attention, given | {"checked": None}, ValueError, words)
        monkeypatch.setenv("ART_CHECKED", "0")
        good = decode_attention(**decode_arguments(gpu), checked=True)  # the device still works
        assert (good.tokens_read > 0).all()


@pytest.mark.parametrize("limit", [-1.0, float("nan")])
def test_checked_mode_finds_bad_thresholds(limit, gpu):
    criterion = Stability(torch.tensor([0.1, limit], device=gpu), torch.ones(2, device=gpu), 1)
    given = decode_arguments(gpu) | {"criterion": criterion, "checked": True}
    assert_refused(decode_attention, given, ValueError, "thresholds")


@pytest.mark.parametrize("slot", [144, -2, 2**40])
def test_checked_mode_finds_bad_slots(slot, gpu, monkeypatch):
    given = append_arguments(gpu)
    given["slot_mapping"] = torch.tensor([5, slot, 0], device=gpu)
    append_kv(**given)  # skipped
    monkeypatch.setenv("ART_CHECKED", "1")
    assert_refused(append_kv, given, ValueError, str(slot))


CALLS = {
    "attention": "art_torch.decode_attention(query, keys, keys, table, lens)",
    "walk": "art_torch.guided_walk(query, keys, table, lens, codes, table)",
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_kernels_that_do_not_exist(call, gpu):
    """A RuntimeError, for no argument is wrong. In a process of its own: ART_CUDA is read once."""
    program = f"""
import torch, art_torch
torch.set_default_device("{gpu}")
query, keys = torch.zeros(1, 2, 32), torch.zeros(1, 64, 1, 32)
table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([64], dtype=torch.int32)
codes = torch.zeros(1, 1, art_torch.key_code_bytes(32), dtype=torch.uint8)
{call}
"""
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "ART_CUDA": "sm70"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 1
    words = "RuntimeError: ART_CUDA must be sm90, sm80 or portable, got sm70"
    assert words in done.stderr, done.stderr


def test_the_argument_goes_before_the_environment(gpu, monkeypatch):
    monkeypatch.setenv("ART_CHECKED", "1")
    given = decode_arguments(gpu) | {"block_table": int32([[3, 1, 2], [4, 9, 0]], gpu)}
    decode_attention(**given, checked=False)
    assert_refused(decode_attention, given, ValueError, "9")


def test_checked_mode_changes_no_bit(gpu):
    case = Case("checked", (700, 65, 0), 8, 2, head_dim=128, value_dim=128)
    inputs = build(case, torch.bfloat16, gpu)
    for criterion in (None, Stability()):
        results = [
            inputs.call(decode_attention, criterion=criterion, checked=checked)
            for checked in (True, False)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_indices_out_of_range_stay_inside_the_cache(gpu, report):
    """In a process of its own, for a fault would end all that comes after it in this one."""
    command = [sys.executable, str(HERE / "reduced.py"), "--out-of-range"]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    if with_sanitizer := os.access(sanitizer, os.X_OK):
        # Every tensor in an allocation of its own: only so does reading beside it show.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        options = ["--tool", "memcheck", "--error-exitcode", "9", "--kernel-name", "kns=3art4cuda"]
        command = [sanitizer, *options, *command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    report(f"indices out of range: run {'under' if with_sanitizer else 'without'} memcheck")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def with_int8_caches(given):
    """The same call with int8 caches and scales of the right shapes."""
    for name in ("key", "value"):
        cache = given[f"{name}_cache"]
        given[f"{name}_cache"] = cache.to(torch.int8)
        given[f"{name}_scale"] = torch.ones(cache.shape[:3], device=cache.device)
    return given


def test_int8_caches(gpu):
    """Kernels for them are on the CPU only."""
    words = "int8 caches run on the CPU"
    assert_refused(decode_attention, with_int8_caches(decode_arguments(gpu)), ValueError, words)
    assert_refused(append_kv, with_int8_caches(append_arguments(gpu)), ValueError, words)
