"""Fused LoRA layers: PEFT's values and gradients, and PEFT's own code where one is not plain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from refusal_tokens.fused_lora import fuse_adapters

Outcome = tuple[Tensor, Tensor, dict[str, Tensor]]


def adapted(*, bias: bool = True, **config: Any) -> PeftModel:
    """Return two linear layers with adapters whose B is not zero."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 12, bias=bias), nn.GELU(), nn.Linear(12, 5, bias=bias))
    model = get_peft_model(layers, LoraConfig(r=4, target_modules=["0", "2"], **config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def outcome(model: PeftModel, inputs: Tensor) -> Outcome:
    """Return the output, and the gradients of the inputs and of every trained parameter."""
    model.zero_grad()
    own = inputs.clone().requires_grad_()
    out = model(own)
    out.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert own.grad is not None
    return out.detach(), own.grad, gradients


def assert_equal(found: Outcome, expected: Outcome) -> None:
    assert found[2].keys() == expected[2].keys()
    pairs = [(found[0], expected[0]), (found[1], expected[1])]
    pairs += [(found[2][name], gradient) for name, gradient in expected[2].items()]
    for one, other in pairs:
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (0, 8)])
@pytest.mark.parametrize(
    "config",
    [{}, {"bias": False}, {"lora_alpha": 24}, {"use_rslora": True}],
    ids=lambda config: "-".join(config) or "plain",
)
def test_values_and_gradients_are_those_of_peft(
    config: dict[str, Any], shape: tuple[int, ...]
) -> None:
    model = adapted(**config).double()
    inputs = torch.randn(shape, dtype=torch.float64)
    expected = outcome(model, inputs)
    assert fuse_adapters(model) == 2
    assert_equal(outcome(model, inputs), expected)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_under_autocast_it_differs_from_peft_by_rounding_alone(base: torch.dtype) -> None:
    model = adapted()
    inputs = torch.randn(16, 8)
    exact = outcome(model, inputs)
    # bfloat16 is what training keeps a frozen base in, the adapters in float32.
    for layer in (0, 2):
        model.base_model.model[layer].base_layer.to(base)
    with torch.autocast("cpu", torch.bfloat16):
        by_peft = outcome(model, inputs)
        assert fuse_adapters(model) == 2
        fused = outcome(model, inputs)

    def error(found: Outcome) -> float:
        pairs = [(found[2][name], gradient) for name, gradient in exact[2].items()]
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)

    assert fused[0].dtype == by_peft[0].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in fused[2].values())
    assert 0 < error(fused) < 1.5 * error(by_peft) < 0.05


@pytest.mark.parametrize(
    "config",
    [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}],
    ids=lambda config: next(iter(config)),
)
def test_layers_that_are_not_plain_are_left_to_peft(config: dict[str, Any]) -> None:
    assert fuse_adapters(adapted(**config)) == 0


def test_a_trained_base_and_several_adapters_are_left_to_peft() -> None:
    trained = adapted()
    trained.base_model.model[0].base_layer.weight.requires_grad_(True)
    assert fuse_adapters(trained) == 1
    several = adapted()
    several.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    several.base_model.set_adapter(["default", "other"])
    assert fuse_adapters(several) == 0


def test_merged_and_disabled_adapters_act_as_in_peft() -> None:
    model = adapted()
    inputs = torch.randn(3, 8)
    with model.disable_adapter():
        base = model(inputs)
    own = model(inputs)
    assert fuse_adapters(model) == 2
    with model.disable_adapter():
        torch.testing.assert_close(model(inputs), base)
    model.merge_adapter()
    torch.testing.assert_close(model(inputs), own, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(own, base)


def test_a_result_may_be_changed_in_place() -> None:
    # As OLMo does with its queries.
    model = adapted()
    assert fuse_adapters(model) == 2
    model.base_model.model[0](torch.randn(2, 3, 8)).clamp_(-1, 1).sum().backward()


def test_without_autocast_a_finer_adapter_keeps_its_dtype() -> None:
    model = adapted()
    for layer in (0, 2):
        model.base_model.model[layer].base_layer.to(torch.bfloat16)
    inputs = torch.randn(16, 8, dtype=torch.bfloat16)
    expected = outcome(model, inputs)
    assert fuse_adapters(model) == 2
    assert_equal(outcome(model, inputs), expected)


def test_an_adapter_added_later_takes_part() -> None:
    model = adapted()
    fuse_adapters(model)
    inputs = torch.randn(3, 8)
    one = model(inputs)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    assert not torch.allclose(model(inputs), one)
