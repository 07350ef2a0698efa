"""The benchmark compares like with like: every contestant of an operation gives the same numbers, here at tiny sizes on a CPU."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from kernels import bench


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("operation", bench.OPERATIONS, ids=lambda x: x.name)
def test_contestants_agree(operation):
    runs = operation.runs(operation.tiny, "cpu", torch.float32)
    size, operations, rival_bytes = operation.cost(operation.tiny)
    assert size > 0 and operations > 0 and list(runs) == ["ours", *rival_bytes] and set(operation.targets) <= set(rival_bytes)
    function, tensors = runs["ours"]
    ours = function(*tensors)
    assert ours.isfinite().all() and ours.std() > 0.01
    for name, (function, tensors) in runs.items():
        torch.testing.assert_close(function(*tensors), ours, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("operation", [x for x in bench.OPERATIONS if x.step_bytes], ids=lambda x: x.name)
def test_contestants_agree_on_gradients(operation):
    runs = operation.runs(operation.tiny, "cpu", torch.float32)
    gradients = {}
    for name, (function, tensors) in runs.items():
        if name != "flex_attention":  # it has no backward on a CPU
            torch.manual_seed(0)
            gradients[name] = bench.training_step(function, tensors)()
    for name, found in gradients.items():
        for ours, theirs in zip(gradients["ours"], found):
            if theirs.shape != ours.shape:  # keys repeated for each query head: a key's gradient is the sum over its copies
                theirs = theirs.unflatten(1, (ours.shape[1], -1)).sum(2)
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4, msg=lambda text: f"{name}: {text}")


def test_cost_by_hand():
    """Bytes and operations of a case small enough to count: 2 rows, 1 head, 3 tokens of 4 numbers; causal, 6 of 9 pairs are visible."""
    n = {"B": 2, "H": 1, "S": 3, "D": 4}
    causal, full = (next(x for x in bench.OPERATIONS if x.name == f"plain S=8192 D=128{word}") for word in (" causal", ""))
    assert causal.cost(n)[:2] == (4 * 2 * 3 * 4 * 2, 2 * 6 * 4 * 4) and full.cost(n)[1] == 2 * 9 * 4 * 4
    prefix = next(x for x in bench.OPERATIONS if x.name.startswith("prefix"))
    n = prefix.tiny
    segment = torch.cat([torch.zeros(n["prefix"]), 1 + torch.arange(n["Q"]).repeat_interleave(n["S"])])
    pairs = int(((segment == 0) | (segment == segment[:, None])).tril().sum())
    assert prefix.cost(n)[1] == 4 * n["H"] * n["D"] * pairs


def test_lines_with_times():
    """A line's figures follow from the times: here 1 ms for us and 2 ms for every rival on an H200."""
    operation = bench.OPERATIONS[0]
    line, = bench.lines_of(operation, "H200", {"ours": 1.0, "SDPA": 2.0})
    cells = dict(zip(bench.COLUMNS, line))
    assert cells["ours (ms)"] == "1.0000" and cells["rival / ours"] == "2.00" and cells["target"] == ">= 0.7"
    assert cells["TFLOP/s"] == "549.8" and cells["GB/s"] == "134" and cells["/ floor"] == "1.80"  # 549.8 GFLOP at 989 TFLOP/s: 0.556 ms
    cells = dict(zip(bench.COLUMNS, bench.lines_of(operation, None, {"ours": 1.0, "SDPA": 2.0}, backward=True)[0]))
    assert cells["floor (ms)"] == "unknown card" and cells["/ floor"] == "-" and cells["target"] == "-" and cells["GFLOP"] == "1,924.1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the benchmark takes minutes: run python -m kernels.bench")
@pytest.mark.parametrize("arguments", [[], ["--markdown", "--backward"]])
def test_command(arguments):
    done = subprocess.run([sys.executable, "-m", "kernels.bench", *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    for operation in bench.OPERATIONS:
        assert (operation.name in done.stdout) == bool(operation.step_bytes or not arguments)
    assert "H200" in done.stdout and bench.NOT_MEASURED in done.stdout
    unknown = subprocess.run([sys.executable, "-m", "kernels.bench", "--only", "nothing"], capture_output=True, text=True, cwd=ROOT)
    assert unknown.returncode == 1 and "'nothing'" in unknown.stderr
