"""Key codes for the inputs of `cases`, and what every guided walk must satisfy."""

import math

import torch
from cases import CASES, GARBAGE_PAGE, Inputs

from art_torch import encode_keys, guided_walk, key_code_bytes, reference
from art_torch._reference_guided import order_units, rest_after
from art_torch.guided import LOGIT_ARGUMENTS

GROUP, UNIT = 64, 16
STEPS_PER_NAT = 64 / math.log(2)


def for_guided_walks(case):
    """Whether a case is one for walks of units of 16, and no variant that they know nothing of."""
    unit = case.options.get("unit_size", UNIT)
    plain = case.walk == "sink_recent" and case.pinned is None and "block_size" not in case.options
    return plain and unit == UNIT and (case.page_size % UNIT == 0 or case.layout == "dense")


GUIDED_CASES = [case for case in CASES if for_guided_walks(case)]


def empty_pool(num_pages, num_kv_heads, head_dim, one_for_all=False, device="cpu"):
    """A pool of code records, full of bytes that nobody may look at."""
    shape = (num_pages, 1 if one_for_all else num_kv_heads, key_code_bytes(head_dim))
    pool = torch.full(shape, 0xFF, dtype=torch.uint8, device=device)
    return pool.expand(-1, num_kv_heads, -1)


def code_arguments(inputs, seed=0):
    """A shuffled pool and table for all groups that the block tables can hold, not yet encoded."""
    _, keys, _, table, _ = inputs.tensors
    num_kv_heads, head_dim = keys.shape[2:]
    groups = table.shape[-1] * keys.shape[1] // GROUP
    shape = (*table.shape[:-1], groups)
    g = torch.Generator().manual_seed(seed)
    ids = torch.randperm(math.prod(shape) + 3, generator=g)
    one_for_all = num_kv_heads > 1 and keys.stride(2) == 0
    pool = empty_pool(len(ids), num_kv_heads, head_dim, one_for_all, keys.device)
    return pool, ids[: math.prod(shape)].view(shape).int().to(keys.device)


def with_codes(inputs, seed=0):
    """Encode a case. Returns (key_codes, code_table): garbage where no token is visible."""
    _, keys, _, table, lens = inputs.tensors
    pool, code_table = code_arguments(inputs, seed)
    # Whoever encodes has all tokens; here those that are not visible come from some page.
    known = table.where(table != GARBAGE_PAGE, 0)
    encode_keys(keys, known, lens, pool, code_table, key_scale=inputs.options.get("key_scale"))
    used = code_table.clone()
    for b, h in [(b, h) for b in range(len(table)) for h in range(keys.shape[2])]:
        visible = visible_of(inputs, b, h)
        first, last = visible.start // GROUP, visible.stop // GROUP
        row = used[b] if used.ndim == 2 else used[b, h]
        if used.ndim == 3 or lens.ndim == 1:
            row[:first] = GARBAGE_PAGE
            row[last if visible else 0 :] = GARBAGE_PAGE
    return pool, used


def visible_of(inputs, b, h):
    lens, options = inputs.tensors[-1], inputs.options
    seq_len = int(lens[b] if lens.ndim == 1 else lens[b, h])
    starts = options.get("seq_starts")
    start = 0 if starts is None else int(starts[b])
    return reference.visible_tokens(seq_len, start, options.get("sliding_window"))


def call_guided(function, inputs, codes, **more):
    query, keys, _, table, lens = inputs.tensors
    options = {k: v for k, v in inputs.options.items() if k in LOGIT_ARGUMENTS}
    return function(query, keys, table, lens, *codes, **options, **more)


def guided_inputs(inputs, result):
    """The same case, attending over a guided walk; with what it leaves, if that is known."""
    walk = {"walk": result.walk, "walk_lens": result.walk_lens, "num_pinned": result.num_pinned}
    if result.log_rest.shape[-1]:
        walk["log_rest"] = result.log_rest
    return Inputs(inputs.tensors, {**inputs.options, **walk})


def check(inputs, codes, result=None):
    """Compare one guided walk with the reference, and its order with its own shares.

    Returns how many shares there are, and how many roundings went to another step.
    """
    result = call_guided(guided_walk, inputs, codes) if result is None else result
    expected = call_guided(reference.guided_walk, inputs, codes)
    assert result.walk.dtype == result.walk_lens.dtype == result.num_pinned.dtype == torch.int32
    assert result.log_mass.dtype == torch.float32
    result = type(result)(*(t.cpu() for t in result))
    assert result.walk.shape == result.log_mass.shape == expected.walk.shape
    assert torch.equal(result.walk_lens, expected.walk_lens)
    assert torch.equal(result.num_pinned, expected.num_pinned)
    total, different = 0, 0
    for b, h in [(b, h) for b in range(len(result.walk)) for h in range(result.walk.shape[1])]:
        n = int(result.walk_lens[b, h])
        assert (result.walk[b, h, n:] == -1).all()
        assert (result.log_mass[b, h, n:] == -math.inf).all()
        if n == 0:
            continue
        steps, wanted = (_steps_by_unit(r, b, h) for r in (result, expected))
        order, num_pinned = order_units(steps, visible_of(inputs, b, h))
        assert result.walk[b, h, :n].tolist() == order
        assert result.num_pinned[b, h] == num_pinned
        _assert_near(steps, *_exact_steps(inputs, codes, b, h))
        if torch.equal(steps, wanted):
            assert torch.equal(result.walk[b, h], expected.walk[b, h])
        away = steps - wanted
        # Where the total of a query head fell on the other side, all units in which that head has
        # the largest share are a step away, in one direction: one rounding.
        one_way = bool((away >= 0).all()) or bool((away <= 0).all())
        roundings = 1 if one_way and away.any() else int((away != 0).sum())
        total, different = total + n, different + roundings
    return total, different


def check_rest(inputs, codes, result):
    """Compare what a guided walk says that it leaves with its units, step by step and all in all.

    Returns how many numbers there are, and how many were rounded to another step.
    """
    result = type(result)(*(t.cpu() for t in result))
    group = result.log_rest.shape[1] // result.walk.shape[1]
    total, different = 0, 0
    for b, h in [(b, h) for b in range(len(result.walk)) for h in range(result.walk.shape[1])]:
        rest = result.log_rest[b, h * group : (h + 1) * group].double()
        n = int(result.walk_lens[b, h])
        assert (rest[:, max(n - 1, 0) :] == -math.inf).all()
        if n < 2:
            continue
        units = result.walk[b, h, :n].long()
        lse, _, magnitude = _exact_lse(inputs, codes, b, h)
        lse, rest = lse[:, units - units.min()], rest[:, : n - 1]
        away = (rest - rest_after(lse)[:, : n - 1]).nan_to_num(0.0, -1.0, -1.0) * STEPS_PER_NAT
        noise = 16 * 2.0**-24 * STEPS_PER_NAT * magnitude + 0.02
        assert away.abs().max() <= 1 + noise
        total, different = total + rest.numel(), different + int((away.abs() > 0.5).sum())
        # Half a step each for the rounding of the units and of their sum. A weight is rounded down
        # to a multiple of 2^-31 of the largest, which only matters where little is left.
        exact = lse.flip(-1).logcumsumexp(-1).flip(-1)[:, 1:]
        fine = exact > lse.amax(-1, keepdim=True) + math.log(n * 1e3) - 31 * math.log(2)
        away = (rest - exact)[fine] * STEPS_PER_NAT
        assert fine[:, 0].all()
        assert away.abs().max() <= 1.1 + noise
    return total, different


def _steps_by_unit(result, b, h):
    n = int(result.walk_lens[b, h])
    units = result.walk[b, h, :n].long()
    steps = result.log_mass[b, h, :n].double() * STEPS_PER_NAT
    assert ((steps - steps.round()).abs() < 0.02).all()  # shares are whole numbers of steps
    by_unit = torch.zeros(n, dtype=torch.int64)
    by_unit[units - units.min()] = steps.round().long()
    return by_unit


def _exact_steps(inputs, codes, b, h):
    """Shares without any rounding, and the magnitude of the terms that a logit is summed from."""
    lse, total, magnitude = _exact_lse(inputs, codes, b, h)
    return (lse - total[:, None]).amax(0) * STEPS_PER_NAT, magnitude


def _exact_lse(inputs, codes, b, h):
    """Of every unit and of all of them with the sinks, for each query head; and that magnitude."""
    query, _, _, table, _ = (t.cpu() for t in inputs.tensors)
    keys = inputs.caches[0].cpu()
    options = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in inputs.options.items()}
    pool, code_table = (t.cpu() for t in codes)
    visible, group_size = visible_of(inputs, b, h), query.shape[1] // keys.shape[2]
    heads = slice(h * group_size, (h + 1) * group_size)
    table = table[b] if table.ndim == 2 else table[b, h]
    code_table = code_table[b] if code_table.ndim == 2 else code_table[b, h]
    dim, page_size = query.shape[-1], keys.shape[1]
    rows = []
    for token in visible:
        group = token // GROUP
        if (group + 1) * GROUP > visible.stop:
            rows.append(keys[int(table[token // page_size]), token % page_size, h].double())
            continue
        if token == visible.start or token % GROUP == 0:
            decoded = reference.decode_keys(pool[int(code_table[group]), h], dim)
        rows.append(decoded[token % GROUP])
    rows = torch.stack(rows)
    scale = options.get("scale") or 1 / math.sqrt(dim)
    query = query[b, heads].double() * scale
    logits = query @ rows.T
    # Codes are summed as parts of a grid that reaches further than the keys.
    magnitude = 8 * (query.abs() @ rows.abs().amax(0)).max() + 1
    if options.get("softcap"):
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    if options.get("alibi_slopes") is not None:
        distance = torch.tensor(visible) - (visible.stop - 1)
        logits = logits + options["alibi_slopes"][heads, None].double() * distance
    magnitude += logits.abs().max()
    sinks = options.get("attn_sinks")
    everything = logits if sinks is None else torch.cat([logits, sinks[heads, None].double()], -1)
    units = torch.tensor(visible) // UNIT
    lse = [logits[:, units == u].logsumexp(-1) for u in units.unique()]
    return torch.stack(lse, -1), everything.logsumexp(-1), magnitude


def _assert_near(steps, exact, magnitude):
    """Half a step each for a unit's rounding, for the total's, and for that of its parts."""
    allowed = 1.5 + 16 * 2.0**-24 * STEPS_PER_NAT * magnitude + 0.01
    assert (steps - exact).abs().max() <= allowed
