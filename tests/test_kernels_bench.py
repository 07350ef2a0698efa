"""The benchmark compares like with like: all contestants of an operation give the same numbers.

Here at tiny sizes on a CPU.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import script
from gpu import bench

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
NEAR = {"rtol": 1e-3, "atol": 1e-4}
WITH_BACKWARD = [x for x in bench.OPERATIONS if x.step_bytes]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("operation", bench.OPERATIONS, ids=lambda x: x.name)
def test_contestants_agree(operation):
    runs = operation.runs(operation.tiny, "cpu", torch.float32)
    size, operations, baseline_bytes = operation.cost(operation.tiny)
    assert size > 0 and operations > 0
    assert list(runs) == ["ours", *baseline_bytes]
    assert set(operation.targets) <= set(baseline_bytes)
    function, tensors = runs["ours"]
    ours = function(*tensors)
    assert ours.isfinite().all() and ours.std() > 0.01
    for name, (function, tensors) in runs.items():
        torch.testing.assert_close(
            function(*tensors), ours, **CLOSE, msg=partial("{}: {}".format, name)
        )


@pytest.mark.parametrize("operation", WITH_BACKWARD, ids=lambda x: x.name)
def test_contestants_agree_on_gradients(operation):
    runs = operation.runs(operation.tiny, "cpu", torch.float32)
    gradients = {}
    for name, (function, tensors) in runs.items():
        if name != "flex_attention":  # it has no backward on a CPU
            torch.manual_seed(0)
            gradients[name] = bench.training_step(function, tensors)()
    for name, found in gradients.items():
        for ours, theirs in zip(gradients["ours"], found, strict=True):
            if theirs.shape != ours.shape:
                # Keys repeated per query head: a key's gradient is the sum over its copies.
                theirs = theirs.unflatten(1, (ours.shape[1], -1)).sum(2)
            torch.testing.assert_close(theirs, ours, **NEAR, msg=partial("{}: {}".format, name))


def test_cost_by_hand():
    """Bytes and operations of a case small enough to count.

    2 rows, 1 head, 3 tokens of 4 numbers; causal, 6 of 9 pairs are visible.
    """
    n = SimpleNamespace(B=2, H=1, S=3, D=4)
    of = {operation.name: operation for operation in bench.OPERATIONS}
    size, operations, _ = of["plain S=8192 D=128 causal"].cost(n)
    assert (size, operations) == (4 * 2 * 3 * 4 * 2, 2 * 6 * 4 * 4)
    assert of["plain S=8192 D=128"].cost(n)[1] == 2 * 9 * 4 * 4
    prefix = of["prefix 2560 + 8 x 64"]
    n = prefix.tiny
    questions = 1 + torch.arange(n.Q).repeat_interleave(n.S)
    segment = torch.cat([torch.zeros(n.prefix), questions])
    pairs = int(((segment == 0) | (segment == segment[:, None])).tril().sum())
    assert prefix.cost(n)[1] == 4 * n.H * n.D * pairs


def test_lines_with_times():
    """A line's figures follow from the times: 1 ms for us, 2 ms for every baseline, on an H200."""
    operation, times = bench.OPERATIONS[0], {"ours": 1.0, "SDPA": 2.0}
    [cells] = bench.lines_of(operation, "H200", times)
    assert cells["ours (ms)"] == "1.0000" and cells["times"] == "2.00"
    assert cells["target"] == ">= 0.7"
    # 549.8 GFLOP at 989 TFLOP/s: 0.556 ms
    assert cells["TFLOP/s"] == "549.8" and cells["GB/s"] == "134" and cells["/ floor"] == "1.80"
    [cells] = bench.lines_of(operation, None, times, backward=True)
    assert cells["floor (ms)"] == "unknown card" and cells["/ floor"] == "-"
    assert cells["target"] == "-" and cells["GFLOP"] == "1,924.1"
    [cells] = bench.lines_of(operation, "H200", None)
    assert not {"ours (ms)", "times"} & set(cells)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the benchmark takes minutes")
@pytest.mark.parametrize("arguments", [[], ["--markdown", "--backward"]])
def test_command(arguments):
    done = script("tests/gpu/bench", *arguments)
    for operation in bench.OPERATIONS:
        shown = operation.name in done.stdout
        assert shown == bool(operation.step_bytes or not arguments)
    assert "H200" in done.stdout and "ours" not in done.stdout


def test_an_unknown_operation_is_named():
    unknown = script("tests/gpu/bench", "--only", "nothing", check=False)
    assert unknown.returncode == 1 and "'nothing'" in unknown.stderr
