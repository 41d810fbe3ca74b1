"""Key codes: the same bytes from the operator and the reference, at once and step by step."""

import math
from pathlib import Path

import pytest
import torch
from cases import CACHE_DTYPES, CASES, DTYPES, Case, build, empty_caches
from coded import GROUP, code_arguments, empty_pool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from art_torch import KEY_CODES_VERSION, append_kv, encode_keys, key_code_bytes, reference
from art_torch._reference_codes import encode_group

pytestmark = pytest.mark.usefixtures("one_thread")
by_name = {"ids": lambda case: case.name}
by_dtype = {"ids": lambda dtype: str(dtype).removeprefix("torch.")}

DIMS = (32, 40, 48, 64, 80, 96, 128, 192, 256)
# Tokens that are not visible are NaN there, and pages without any have no id.
UNHIDDEN = [case for case in CASES if case.starts is None and "sliding_window" not in case.options]
ENCODED = [case for case in UNHIDDEN if case.walk == "sink_recent" and not case.sinks]


def test_the_version_is_that_of_the_specification():
    root = Path(__file__).parent.parent
    for name in ("docs/key_codes.md", "csrc/core/key_codes.h"):
        first = (root / name).read_text().splitlines()[0]
        assert f"format version {KEY_CODES_VERSION}" in first


def encode_one(keys, device="cpu"):
    """The record of keys [64, D] from the operator."""
    pool = empty_pool(1, 1, keys.shape[1], device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    lens = torch.tensor([GROUP], dtype=torch.int32, device=device)
    encode_keys(keys.to(device)[None, :, None], table, lens, pool, table)
    return pool[0, 0].cpu()


def assert_record(keys, device):
    record = encode_one(keys, device)
    assert torch.equal(record, encode_group(keys))
    return record


@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
@pytest.mark.parametrize("case", ENCODED, **by_name)
def test_same_bytes_as_the_reference(case, dtype, device):
    inputs = build(case, dtype, device)
    _, keys, _, table, lens = inputs.tensors
    pool, code_table = code_arguments(inputs)
    expected = pool.clone()
    if keys.stride(2) == 0:
        expected = expected[:, :1].clone().expand_as(pool)
    scale = {"key_scale": inputs.options.get("key_scale")}
    encode_keys(keys, table, lens, pool, code_table, **scale)
    reference.encode_keys(keys, table, lens, expected, code_table, **scale)
    assert torch.equal(pool, expected)
    groups = sum(int(n) // GROUP for n in lens.flatten()) * (1 if lens.ndim == 2 else 2)
    if case.num_kv_heads == 2 and keys.stride(2) != 0 and table.ndim == 2:
        written = (pool != 0xFF).any(-1).sum()
        assert written == groups


@pytest.mark.parametrize("dtype", DTYPES, **by_dtype)
@pytest.mark.parametrize("dim", DIMS)
def test_dimensions(dim, dtype, device):
    g = torch.Generator().manual_seed(dim)
    keys = (torch.randn(GROUP, dim, generator=g) * torch.rand(dim, generator=g).exp2() + 3).to(
        dtype
    )
    record = assert_record(keys, device)
    assert len(record) == key_code_bytes(dim)
    # Two bits an element: within half a step, and what rounding the grid to float16 adds.
    decoded, exact = reference.decode_keys(record, dim), keys.double()
    step = (exact.amax(0) - exact.amin(0)) / 3
    assert ((decoded - exact).abs() <= step / 2 + 2.0**-9 * exact.abs().amax(0)).all()


def test_bytes_of_a_known_record(device):
    """The format by hand: where code and grid of a token and channel are."""
    keys = torch.zeros(GROUP, 32)
    keys[1], keys[2] = 45.0, -3.0  # so that every grid has zero 0 and scale 48 * 7/8 / 3
    keys[0, 0] = 14.0
    keys[8, 17] = 28.0
    keys[16 + 2, 10] = 45.0
    record = encode_one(keys, device).clone()
    scales = torch.full((32,), 14.0, dtype=torch.float16).view(torch.uint8)
    assert torch.equal(record[512:576], scales)
    assert (record[576:] == 0).all()  # zeros
    lane_bytes, unit_bytes = 4, 128
    assert (record[4 * lane_bytes : 8 * lane_bytes].view(-1, 2) == torch.tensor([255, 0])).all()
    record[4 * lane_bytes : 8 * lane_bytes] = 0
    expected = torch.zeros(512, dtype=torch.uint8)
    expected[0] = 1  # token 0: lane 0, first field, low byte, first place
    expected[2 + 1] = 2 << 2  # token 8, channel 17: lane 0, second field, high byte, second place
    expected[unit_bytes + (2 * 4 + 1) * lane_bytes] = 3 << 4  # token 18, channel 10: lane 9, third
    assert torch.equal(record[:512], expected)


def test_masked_codes_are_denormals(device):
    """What tensor cores rely on: in a word of two fields, codes of tokens t and t + 8 lie under the
    same masks, the latter after one shift; both halves of the word belong to the same lane."""
    g = torch.Generator().manual_seed(0)
    keys = torch.randint(0, 4, (GROUP, 64), generator=g).float()
    keys[0], keys[1] = 0, 3
    words = encode_one(keys, device)[: 4 * 32 * 8].clone().view(torch.int32).view(4, 32, 2).long()
    for unit, lane, pair in [(0, 0, 0), (1, 5, 1), (3, 31, 0), (2, 18, 1)]:
        word = int(words[unit, lane, pair]) & 0xFFFFFFFF
        for half, place in [(half, place) for half in range(2) for place in range(4)]:
            masked = word >> 8 * half & 0x00030003 << 2 * place
            token = unit * 16 + lane // 4 + 8 * half
            channels = [
                32 * pair + 16 * upper + lane % 4 * 2 + place % 2 + 8 * (place // 2)
                for upper in range(2)
            ]
            halves = torch.tensor([masked & 0xFFFF, masked >> 16], dtype=torch.int16)
            numbers = halves.view(torch.float16).double() * 2.0**24 / 4**place
            assert torch.equal(numbers, keys[token, channels].double())


def channels(*pattern):
    """A group with the same keys in all channels: a pattern, repeated."""
    keys = torch.tensor(pattern, dtype=torch.float32)
    return keys.repeat(GROUP // len(pattern))[:, None].expand(-1, 32).contiguous()


def ramp(start, end):
    return torch.linspace(start, end, GROUP)[:, None].expand(-1, 32).contiguous()


SPECIAL = {
    "constant": channels(0.7),
    "zeros": channels(0.0),
    "signed_zeros": channels(0.0, -0.0),
    "huge": ramp(-3e38, 3e38),
    "above_half": ramp(60000, 70000),
    "denormal": ramp(-1e-41, 1e-41),
    "half_denormal": ramp(-3e-7, 2e-7),
    "nearly_constant": ramp(1000.3, 1000.301),
    "nan": channels(math.nan),
    "infinite": channels(math.inf, -math.inf, 1.0, math.nan),
    "ties": channels(0.0, 0.625, 1.5, 2.375, 3.0, 1.0, 2.0, 2.75),
}


@pytest.mark.parametrize("dtype", DTYPES, **by_dtype)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_keys(name, dtype, device):
    record = assert_record(SPECIAL[name].to(dtype), device)
    assert reference.decode_keys(record, 32).isfinite().all()


def test_what_special_keys_become():
    def decoded(name):
        return reference.decode_keys(encode_one(SPECIAL[name]), 32)[:, 0]

    assert (decoded("nan") == 0).all()
    assert (decoded("signed_zeros") == 0).all()
    assert ((decoded("constant") - 0.7).abs() < 1e-3).all()
    infinite = decoded("infinite")[:4]
    assert infinite[0] == -infinite[1] == 57312  # 7/8 of 65504, to float16
    codes = (decoded("ties")[:8] - 3 / 16) / (7 / 8)
    assert codes.tolist() == [0, 0, 2, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads(threads):
    inputs = build(Case("ragged", (1000, 17, 640, 0, 65)), torch.bfloat16)
    _, keys, _, table, lens = inputs.tensors
    pool, code_table = code_arguments(inputs)
    expected = pool.clone()
    encode_keys(keys, table, lens, expected, code_table)
    torch.set_num_threads(threads)
    for _ in range(5):
        again = pool.clone()
        encode_keys(keys, table, lens, again, code_table)
        assert torch.equal(again, expected)


class Decoding:
    """A cache that grows and shrinks, its codes kept up step by step."""

    def __init__(self, draw, per_head, device):
        self.draw, self.heads, self.capacity = draw, 2, 320
        self.g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        self.page = draw(st.sampled_from([16, 32, 64, 80]))
        layout = draw(st.sampled_from(["nhd", "hnd", "tokens_last", "padded"]))
        pages = self.capacity // self.page
        self.keys, self.values = empty_caches(
            layout, 2 * pages + 3, self.page, 2, 40, 40, device=device
        )
        shape = (2, pages)
        self.table = torch.randperm(2 * pages + 3, generator=self.g)[: 2 * pages].view(shape).int()
        groups = self.capacity // GROUP
        self.pool = empty_pool(2 * groups + 1, 2, 40, device=device).clone()
        ids = torch.randperm(2 * groups + 1, generator=self.g)[: 2 * groups]
        self.code_table = ids.view(2, groups).int()
        shape = (2, 2) if per_head else (2,)
        self.lens = torch.zeros(shape, dtype=torch.int32)
        self.device = device

    def encode(self, pool, coded_lens=None):
        """With tables and lengths, which are drawn on the CPU, where the keys are."""
        table, lens, codes = (t.to(self.device) for t in (self.table, self.lens, self.code_table))
        if coded_lens is not None:
            coded_lens = coded_lens.to(self.device)
        encode_keys(self.keys, table, lens, pool, codes, coded_lens=coded_lens)

    def grow(self):
        before = self.lens.clone()
        for index in range(self.lens.numel()):
            room = self.capacity - int(self.lens.flatten()[index])
            self.lens.view(-1)[index] += self.draw(st.integers(0, min(room, 150)))
        for b in range(2):
            for h in range(2):
                low, high = (int(t[b] if t.ndim == 1 else t[b, h]) for t in (before, self.lens))
                tokens = torch.arange(low, high)
                slots = torch.full((len(tokens), 2), -1)
                slots[:, h] = self.table[b, tokens // self.page].long() * self.page
                slots[:, h] += tokens % self.page
                new = torch.randn(2, len(tokens), 2, 40, generator=self.g)
                new, slots = new.to(self.device), slots.to(self.device)
                append_kv(*new, self.keys, self.values, slots)
        self.encode(self.pool, before)

    def crop(self):
        for index in range(self.lens.numel()):
            self.lens.view(-1)[index] = self.draw(st.integers(0, int(self.lens.flatten()[index])))

    def check(self):
        expected = torch.zeros_like(self.pool)
        self.encode(expected)
        for b in range(2):
            for h in range(2):
                seq_len = self.lens[b] if self.lens.ndim == 1 else self.lens[b, h]
                pages = self.code_table[b, : seq_len // GROUP].long()
                assert torch.equal(self.pool[pages, h], expected[pages, h])


@settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(st.data(), st.booleans())
def test_step_by_step_is_as_at_once(device, data, per_head):
    decoding = Decoding(data.draw, per_head, device)
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.integers(0, 2)) == 0:
            decoding.crop()
        else:
            decoding.grow()
        decoding.check()


def test_groups_that_are_coded_are_left_alone(device):
    inputs = build(Case("left", (300,)), torch.float32, device)
    _, keys, _, table, lens = inputs.tensors
    pool, code_table = code_arguments(inputs)
    coded = torch.tensor([130], dtype=torch.int32, device=device)
    encode_keys(keys, table, lens, pool, code_table, coded_lens=coded)
    written = (pool != 0xFF).any(-1).any(-1)
    assert sorted(code_table[0, 2:4].tolist()) == written.nonzero().flatten().tolist()
