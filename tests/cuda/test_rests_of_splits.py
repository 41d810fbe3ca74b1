"""ResidualMass stops where the reference does, however many thread blocks share a sequence."""

import math

import pytest
import torch
from cases import Case, Inputs, build
from gpu_helpers import (
    MARGIN_SHARES,
    NEVER,
    SPLITS,
    Remembered,
    SplitStops,
    assert_same_bits,
    call_split,
    capture,
    soil,
)
from rests import with_true_rest

from art_torch import ResidualMass, Stability

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("one_thread")]

KINDS = {
    "bf16_128_g4": (torch.bfloat16, 128, 4),
    "f16_64_g5": (torch.float16, 64, 5),
    "bf16_96_g16": (torch.bfloat16, 96, 16),
    "f16_256_g1": (torch.float16, 256, 1),
    "bf16_128_g20": (torch.bfloat16, 128, 20),
    "f32_64_g64": (torch.float32, 64, 64),
}
by_kind = {"argnames": "kind", "argvalues": KINDS.values(), "ids": KINDS}

# ---------------------------------------------------------------- what is truly left

SETTLED = Stability(0.1, 5e-3, 2)
CRITERIA = [
    ResidualMass(0.3),
    SETTLED | ResidualMass(0.05),
    SETTLED & ResidualMass(0.4),
    ResidualMass(0.02),
    Stability(0.02, 2e-4, 2) & ResidualMass(0.1),
    Stability(torch.tensor([0.1, 0.02]), torch.tensor([5e-3, 2e-4]), 3) | ResidualMass(0.01),
]


def random_case(seed, head_dim, group):
    """Attention on few tokens or many; every other walk lists many units that nobody may see."""
    g = torch.Generator().manual_seed(seed)
    lens = torch.randint(300, 3500, (3,), generator=g).tolist()
    return Case(
        "random",
        (*lens, 1),
        num_q_heads=2 * group,
        head_dim=head_dim,
        value_dim=head_dim,
        page_size=(16, 64, 32)[seed % 3],
        query_scale=(9.0, 5.0, 2.0)[seed // 2 % 3],
        sinks=seed % 4 == 1,
        starts=tuple(n // 3 for n in (*lens, 0)) if seed % 2 else None,
        walk="explicit",
        pinned="per_head",
        options={"block_size": (64, 16, 128)[seed % 3]},
    )


@pytest.mark.parametrize(**by_kind)
def test_stops_are_those_of_the_reference(kind, gpu, report):
    dtype, head_dim, group = kind
    stops = SplitStops()
    for seed in range(6):
        case = random_case(seed, head_dim, group)
        host = with_true_rest(build(case, dtype, "cpu", seed))
        host = Remembered(host.tensors, host.options)
        inputs = host.to(gpu)
        for criterion in (CRITERIA[seed], CRITERIA[seed - 3]):
            stops.add(host, inputs, criterion)
    report(f"ResidualMass, {dtype}, D{head_dim} G{group}: {stops.summary()}")
    assert stops.share <= MARGIN_SHARES[dtype]
    assert stops.stopped > len(stops.stops) / 2
    assert len(set(stops.stops)) > 12


# ---------------------------------------------------------------- what is made up

UNIT, BLOCK_UNITS, MAX_UNITS = 16, 4, 161  # tokens, units of a block, entries of a walk
LENGTHS = (2571, 2100, 1500, 65, 1, 0)
ANYTHING = Stability(math.inf, math.inf, 3)  # settled from block 3 on


class MadeUp:
    """Heads that are covered after one block only, and the blocks they have.

    One query head of each group decides, the others never have anything left. Entries of which
    nobody may ask say that nothing is left: those inside a block or inside the pinned units, and
    units that are not visible.
    """

    def __init__(self, kind, device, seed):
        dtype, head_dim, group = kind
        g = torch.Generator().manual_seed(seed)
        self.lens = torch.tensor([LENGTHS[(seed + i) % len(LENGTHS)] for i in range(4)]).view(2, 2)
        orders = [torch.randperm(MAX_UNITS, generator=g) for _ in range(4)]
        self.walk = torch.stack(orders).view(2, 2, MAX_UNITS)
        self.walk_lens = torch.randint(MAX_UNITS - 20, MAX_UNITS + 1, (2, 2), generator=g)
        self.pinned = torch.randint(-6, 12, (2, 2), generator=g).clamp(min=0)
        self.blocks = [[self._last_entries(b, h) for h in range(2)] for b in range(2)]
        self.covered = torch.full((2, 2), -1)
        log_rest = torch.full((2, 2, group, MAX_UNITS), -math.inf)
        for b, h in PAIRS:
            blocks = self.blocks[b][h]
            head = int(torch.randint(0, group, (), generator=g))
            log_rest[b, h, head, blocks] = 100.0
            chosen = int(torch.randint(0, len(blocks) + 1, (), generator=g))
            if chosen < len(blocks):
                log_rest[b, h, head, blocks[chosen]] = -math.inf
                self.covered[b, h] = chosen
        cache = torch.rand(1, UNIT, 2, head_dim, generator=g).to(dtype)  # one page for all
        query = torch.zeros(2, 2 * group, head_dim, dtype=dtype)
        table = torch.zeros(2, MAX_UNITS, dtype=torch.int32)
        options = {
            "walk": self.walk.int(),
            "walk_lens": self.walk_lens.int(),
            "num_pinned": self.pinned.int(),
            "log_rest": log_rest.flatten(1, 2),
        }
        self.inputs = Inputs((query, cache, cache, table, self.lens.int()), options).to(device)

    def _kept(self, b, h):
        """Entries of visible units, and how many of them are pinned."""
        visible = self.walk[b, h, : self.walk_lens[b, h]] * UNIT < self.lens[b, h]
        return visible.nonzero().flatten(), int(visible[: self.pinned[b, h]].sum())

    def _last_entries(self, b, h):
        kept, pinned = self._kept(b, h)
        ends = [pinned] if pinned else []
        ends += [min(end + BLOCK_UNITS, len(kept)) for end in range(pinned, len(kept), BLOCK_UNITS)]
        return [int(kept[end - 1]) for end in ends]

    def tokens(self, b, h, stop):
        kept, _ = self._kept(b, h)
        if stop >= 0:
            kept = kept[kept <= self.blocks[b][h][stop]]
        left = self.lens[b, h] - self.walk[b, h, kept] * UNIT
        return int(left.clamp(max=UNIT).sum())

    def stops(self):
        """Criteria, and where they stop."""
        num_blocks = torch.tensor([[len(blocks) for blocks in row] for row in self.blocks])
        third = torch.where(num_blocks > 3, 3, -1)
        either = torch.where(self.covered < 0, third, self.covered)
        either = torch.where((third >= 0) & (either > 3), 3, either)
        yield ResidualMass(0.0), self.covered
        yield NEVER | ResidualMass(0.5), self.covered
        yield ANYTHING | ResidualMass(0.5), either
        yield ANYTHING & ResidualMass(0.5), self.covered.where(self.covered >= 3, -1)

    def check(self, result, stops):
        assert torch.equal(result.stop_block.cpu().long(), stops)
        tokens = torch.tensor([self.tokens(b, h, int(stops[b, h])) for b, h in PAIRS])
        assert torch.equal(result.tokens_read.cpu().long().flatten(), tokens)
        # Logits are 0: what is read weighs as much as there are tokens.
        lse = tokens.double().log().view(2, 2, 1)
        found = result.lse.cpu().double().view(2, 2, -1)
        torch.testing.assert_close(found, lse.expand_as(found), rtol=0, atol=1e-5)
        assert (result.out.cpu().view(2, 2, -1)[self.lens == 0] == 0).all()


PAIRS = [(b, h) for b in range(2) for h in range(2)]


@pytest.mark.parametrize("num_splits", SPLITS)
@pytest.mark.parametrize(**by_kind)
def test_every_block_can_be_the_last(kind, num_splits, gpu):
    pending, seen = [], set()
    for seed in range(24):
        made = MadeUp(kind, gpu, seed)
        soil(gpu, (0xFF, 0x00, 0x7F)[seed % 3])
        for criterion, stops in made.stops():
            pending.append((made, call_split(made.inputs, criterion, num_splits), stops))
            seen |= set(stops.flatten().tolist())
    for made, result, stops in pending:
        made.check(result, stops)
    assert len(seen) > 25


@pytest.mark.parametrize("num_splits", SPLITS)
@pytest.mark.parametrize(**by_kind)
def test_a_replay_of_every_split(kind, num_splits, gpu):
    """A captured call follows walks and rests that change in their buffers."""
    buffers = MadeUp(kind, gpu, 0).inputs
    cases = [MadeUp(kind, gpu, seed) for seed in (0, 1, 2, 3, 0)]
    for number, (criterion, _) in enumerate(cases[0].stops()):
        graph, result = capture(lambda c=criterion: call_split(buffers, c, num_splits))
        for made in cases:
            for buffer, new in zip(buffers.tensors, made.inputs.tensors, strict=True):
                buffer.copy_(new)
            for name, new in made.inputs.options.items():
                buffers.options[name].copy_(new)
            for _ in range(3):  # a counter that is not left as it was found shows up here
                graph.replay()
            made.check(result, list(made.stops())[number][1])
            assert_same_bits(result, call_split(made.inputs, criterion, num_splits))
