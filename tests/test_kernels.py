"""The kernels under Triton's interpreter and, where there is one, on a GPU.

In processes of their own: TRITON_INTERPRET counts when triton is imported, and must not reach other
tests.
"""

import os
import subprocess
import sys

import pytest
from conftest import GPU, ROOT

INTERPRETED = sorted((ROOT / "tests/gpu/interpreted").glob("*.py"))
REGISTER = ROOT / "tests/test_kernels_register.py"
MODEL = [
    f"{REGISTER}::test_logits_of_a_left_padded_batch[qwen2.5]",
    f"{REGISTER}::test_once_per_pass_is_found_what_the_kernels_may_skip[qwen2.5]",
]
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None                # what `import triton` meets on macOS and Windows
import torch
from kernels.attention import attention
from kernels.rays import plucker_rays
from kernels.temporal import temporal_attention, temporal_attention_reference
x = torch.randn(6, 2, 64)
assert temporal_attention(x, x, x, 3).equal(temporal_attention_reference(x, x, x, 3))
assert attention(*torch.randn(3, 1, 2, 5, 32), causal=True, scale=None).shape == (1, 2, 5, 32)
assert plucker_rays(torch.eye(4)[None], torch.eye(3)[None], 2, 3).shape == (1, 6, 2, 3)
"""


def python(*arguments, **variables) -> None:
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]


def test_interpreted():
    """And with them part of test_kernels_register.py, a whole model on the kernels instead of the
    reference; its gradients take minutes there.
    """
    pytest.importorskip("triton")
    python("-m", "pytest", "-q", "--durations=9", *INTERPRETED, *MODEL, TRITON_INTERPRET="1")


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("path", INTERPRETED, ids=lambda path: path.stem)
def test_on_the_gpu(path):
    python("-m", "pytest", "-q", "--durations=5", path, TRITON_INTERPRET="0")


def test_cpu_tensors_take_the_reference_without_triton():
    python("-c", WITHOUT_TRITON, TRITON_INTERPRET="0")
