"""The stream and the device of the caller, also when others are busy."""

import pytest
import torch
from cases import Inputs
from gpu_helpers import EARLY, LATE, Large, assert_same_bits, call_split, same_bits

from art_torch import append_kv, decode_attention

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda

CYCLES = 100_000_000  # about 50 ms


def blank(inputs):
    """The same call on buffers whose contents are still to come."""
    tensors = list(inputs.tensors)
    for i in (0, 1, 2):
        tensors[i] = torch.zeros_like(tensors[i])
    return Inputs(tuple(tensors), inputs.options)


@pytest.mark.parametrize("num_splits", [0, 1, 4])
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.bfloat16, 128), (torch.float16, 72), (torch.float32, 64)],
    ids=["tensor_cores", "portable", "float32"],
)
def test_a_call_waits_for_what_its_stream_produces(dtype, head_dim, num_splits, gpu):
    inputs = Large("side", (3000, 700), head_dim=head_dim).build(dtype, gpu)
    expected = call_split(inputs, EARLY, num_splits)
    late, side = blank(inputs), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        for buffer, ready in zip(late.tensors[:3], inputs.tensors[:3], strict=True):
            buffer.copy_(ready)
        result = call_split(late, EARLY, num_splits)
        copies = [tensor.clone() for tensor in result]
        for tensor in result:  # nothing of the call may still be under way behind this
            tensor.zero_()
    side.synchronize()
    assert_same_bits(copies, expected)
    assert all((tensor == 0).all() for tensor in result)


def test_append_waits_for_what_its_stream_produces(gpu):
    cache = [torch.zeros(8, 16, 2, 64, device=gpu) for _ in range(2)]
    new, ready = torch.zeros(5, 2, 64, device=gpu), torch.ones(5, 2, 64, device=gpu)
    slots = torch.arange(5, device=gpu) * 20
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        new.copy_(ready)
        append_kv(new, new, *cache, slots)
        copies = [tensor.clone() for tensor in cache]
    side.synchronize()
    for copy in copies:
        assert (copy.flatten(0, 1)[slots] == 1).all()
        assert copy.sum() == 5 * 2 * 64


@pytest.mark.parametrize("num_splits", [0, 1, 8])
def test_two_streams_do_not_disturb_each_other(num_splits, gpu):
    calls = [
        (Large("first", (9000, 300)).build(torch.bfloat16, gpu, 0), EARLY),
        (Large("second", (2000, 7000, 1, 0), head_dim=64).build(torch.bfloat16, gpu, 1), LATE),
    ]
    expected = [call_split(inputs, criterion, num_splits) for inputs, criterion in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    same = [[], []]
    for _ in range(100):
        for i, ((inputs, criterion), stream) in enumerate(zip(calls, streams, strict=True)):
            with torch.cuda.stream(stream):
                result = call_split(inputs, criterion, num_splits)
                same[i].append(same_bits(result, expected[i]))
    torch.cuda.synchronize()
    for i in range(2):
        assert torch.stack(same[i]).all()


def test_two_graphs_at_once(gpu):
    """Workspaces of graphs are their own."""
    shapes = [Large("first", (9000,)), Large("second", (5000, 60), head_dim=64)]
    calls = [shape.build(torch.bfloat16, gpu, i) for i, shape in enumerate(shapes)]
    expected = [inputs.call(decode_attention, criterion=EARLY) for inputs in calls]
    graphs, results = [], []
    for inputs in calls:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(inputs.call(decode_attention, criterion=EARLY))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for result, wanted in zip(results, expected, strict=True):
        assert_same_bits(result, wanted)


def test_a_device_that_is_not_the_current_one(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs in one process")
    other = torch.device("cuda", 1)
    with torch.cuda.device(other):
        inputs = Large("other", (3000, 700)).build(torch.bfloat16, other)
        expected = inputs.call(decode_attention, criterion=EARLY)
        new = torch.ones(2, 8, 128, dtype=torch.bfloat16, device=other)
        slots = torch.tensor([40, 41], device=other)
    torch.cuda.set_device(0)
    for num_splits in (0, 1, 4):
        result = call_split(inputs, EARLY, num_splits)
        assert all(tensor.device == other for tensor in result)
        if num_splits == 0:
            assert_same_bits(result, expected)
    append_kv(new, new, *inputs.tensors[1:3], slots)
    assert (inputs.tensors[1].flatten(0, 1)[slots] == 1).all()
    assert torch.cuda.current_device() == 0
    both = Large("both", (3000, 700)).build(torch.bfloat16, torch.device("cuda", 0))
    assert_same_bits(
        [t.cpu() for t in both.call(decode_attention, criterion=EARLY)],
        [t.cpu() for t in both.call(decode_attention, criterion=EARLY)],
    )
