"""PEFT's LoRA layers with one autograd step each: the same products in less time on a CPU.

Under autocast PEFT's forward casts the input to the adapter's float32 (which autocast takes back at
once), scales and adds in steps of their own, and autograd keeps and sums a gradient for each. With
short rows those steps take longer than the adapters' own products.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def fuse_adapters(model: nn.Module) -> int:
    """Let every plain LoRA layer of a model run in one step; return how many do.

    Layers that are more than ``W x + b + scaling * B A x`` stay as PEFT has them: with dropout, a
    trained base, a quantised one, a variant such as DoRA, or several adapters.
    """
    fused = 0
    for layer in model.modules():
        if type(layer) is Linear and _is_plain(layer):
            layer.forward = types.MethodType(_forward, layer)
            fused += 1
    return fused


def _is_plain(layer: Linear) -> bool:
    if type(layer.base_layer) is not nn.Linear or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    return (
        name in layer.lora_A
        and name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.lora_B[name].bias is None
        and not any(p.requires_grad for p in layer.base_layer.parameters())
    )


def _forward(self: Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if self.disable_adapters or self.merged or args or kwargs or not _is_plain(self):
        return Linear.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
    name = self.active_adapters[0]
    weight, bias = self.base_layer.weight, self.base_layer.bias
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    dtype = weight.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    elif a.dtype != dtype:
        # PEFT then runs the adapter in its own, finer dtype.
        return Linear.forward(self, x)  # type: ignore[no-any-return]
    flat = x.to(dtype).reshape(-1, x.shape[-1])
    out: Tensor = _Fused.apply(  # type: ignore[no-untyped-call]
        flat, weight, bias, a, b, self.scaling[name]
    )
    # Outside the step, whose result a model may then change in place.
    return out.view(*x.shape[:-1], len(weight))


class _Fused(torch.autograd.Function):
    """``x W' + bias + scaling * (x A') B'`` for x of (rows, width), in the dtype of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        weight, down, up = weight.to(x.dtype), a.to(x.dtype), (b * scale).to(x.dtype)
        inner = x @ down.t()
        bias = None if bias is None else bias.to(x.dtype)
        out = nn.functional.linear(x, weight, bias).addmm_(inner, up.t())
        ctx.save_for_backward(x, weight, down, up, inner)
        ctx.scale, ctx.dtypes = scale, (a.dtype, b.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, inner = ctx.saved_tensors
        inner_grad = grad @ up
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (grad @ weight).addmm_(inner_grad, down)
        a_grad = (inner_grad.t() @ x).to(ctx.dtypes[0])
        b_grad = (grad.t() @ inner).to(ctx.dtypes[1]) * ctx.scale
        return x_grad, None, None, a_grad, b_grad, None
