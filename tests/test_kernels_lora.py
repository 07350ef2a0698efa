"""kernels/lora.py: the numbers of its equation, and no pass over memory that they do not need."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.lora import LoRA

N, IN, OUT, RANK = 512, 256, 384, 8


class Written(TorchDispatchMode):
    """Bytes that operations wrote into tensors of the layer's full width, views left out."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not op.is_view and "detach" not in str(op):
            self.bytes += out.nbytes if out.numel() in (N * IN, N * OUT) else 0
        return out


def layer_and_input(dtype):
    torch.manual_seed(0)
    layer = LoRA(torch.nn.Linear(IN, OUT).to(dtype).requires_grad_(False), RANK, 2 * RANK)
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    return layer, torch.randn(2, N // 2, IN, dtype=dtype, requires_grad=True)


def equation(layer, x):
    """y and the gradients of x, A and B for the sum of y^2, in float64 and by the equation."""
    weight, bias, A, B = (
        p.detach().double().requires_grad_()
        for p in (layer.base.weight, layer.base.bias, layer.lora_A, layer.lora_B)
    )
    x = x.detach().double().requires_grad_()
    y = x @ weight.T + bias + 2.0 * (x @ A.T @ B.T)
    return [y, *torch.autograd.grad(y.square().sum(), (x, A, B))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_and_gradients_of_the_equation(dtype):
    layer, x = layer_and_input(dtype)
    half = dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        y = layer(x)
        with torch.no_grad():
            alone = layer(x)
    assert y.shape == (2, N // 2, OUT) and y.dtype == dtype
    found = [y, *torch.autograd.grad(y.float().square().sum(), (x, layer.lora_A, layer.lora_B))]
    want = equation(layer, x)
    for a, b in zip(found, want, strict=True):
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error < (2e-2 if half else 1e-5), error
    torch.testing.assert_close(alone, y.detach(), rtol=2e-2 if half else 1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_writes_the_output_once_more_and_nothing_else(dtype):
    """Forward: y, and y again with the update; backward: one gradient of x each, and their sum."""
    layer, x = layer_and_input(dtype)
    size = dtype.itemsize
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        with Written() as forward:
            y = layer(x)
        do = torch.ones_like(y)
        with Written() as backward:
            y.backward(do)
    assert forward.bytes == 2 * size * N * OUT
    assert backward.bytes == 3 * size * N * IN
