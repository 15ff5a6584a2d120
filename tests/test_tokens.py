"""Control tokens in a model: rows added, started, trained alone, and merged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional

from refusal_tokens.errors import InputError
from refusal_tokens.head import LogitTransform
from refusal_tokens.taxonomy import default_taxonomy
from refusal_tokens.tokens import (
    SparseTokensLayer,
    add_control_tokens,
    fit_vocabulary,
    lift_rows,
    make_rows_sparse,
    start_rows,
    trainable_token_indices,
)
from refusal_tokens.trainer import add_labelled_head, weighted_nll

TAXONOMY = default_taxonomy()


def base(tied: bool, spare: int = 0) -> tuple[Any, Any, list[int], int]:
    """A tiny model with control tokens; returns it with tokenizer, ids and old row count."""
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer) + spare, tied=tied)
    old = model.get_input_embeddings().weight.shape[0]
    ids = add_control_tokens(tokenizer, TAXONOMY)
    fit_vocabulary(model, ids)
    start_rows(model, tokenizer, ids, TAXONOMY.descriptions)
    return model, tokenizer, ids, old


def with_lora(model: Any, ids: list[int], sparse: bool = True) -> Any:
    rows = trainable_token_indices(model, ids)
    config = LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", trainable_token_indices=rows
    )
    torch.manual_seed(1)
    wrapped = get_peft_model(model, config)
    if sparse:
        make_rows_sparse(wrapped)
    return wrapped


def batch(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with control tokens among them, and labels on most positions."""
    torch.manual_seed(2)
    tokens = torch.randint(20, 500, (3, 12))
    tokens[0, 5], tokens[1, 3], tokens[2, 8] = ids[0], ids[2], ids[5]
    labels = tokens.clone()
    labels[:, :3] = -100
    return tokens, labels


def test_tokens_follow_the_old_ones_and_the_old_ones_stay() -> None:
    tokenizer = make_tokenizer()
    before = dict(tokenizer.added_tokens_decoder)
    ids = add_control_tokens(tokenizer, TAXONOMY)
    assert ids == list(range(600, 606))
    assert all(tokenizer.added_tokens_decoder[i] == token for i, token in before.items())
    assert add_control_tokens(tokenizer, TAXONOMY) == ids


def test_another_taxonomy_on_the_same_tokenizer_is_refused() -> None:
    tokenizer = make_tokenizer()
    add_control_tokens(tokenizer, TAXONOMY)
    with pytest.raises(InputError, match="already has the refusal token"):
        add_control_tokens(tokenizer, default_taxonomy(single_token=True))


def test_spare_rows_are_used_and_nothing_shrinks() -> None:
    model, _, ids, old = base(tied=True, spare=10)
    assert model.get_input_embeddings().weight.shape[0] == old == 610
    assert max(ids) < old


def test_a_full_vocabulary_grows_by_the_tokens() -> None:
    model, _, _, old = base(tied=False)
    assert model.get_input_embeddings().weight.shape[0] == old + 6
    assert model.get_output_embeddings().weight.shape[0] == old + 6


@pytest.mark.parametrize("tied", [True, False])
def test_rows_start_from_their_descriptions_at_both_ends(tied: bool) -> None:
    model, tokenizer, ids, _ = base(tied)
    words = tokenizer.encode(TAXONOMY.descriptions[2], add_special_tokens=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert torch.allclose(module.weight[ids[2]], module.weight[words].mean(dim=0), atol=1e-6)
        assert not torch.allclose(module.weight[ids[1]], module.weight[ids[2]], atol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_row_gradients_match_the_plain_forward(tied: bool) -> None:
    """The reference trains whole matrices with the model's own forward and loss."""
    model, _, ids, _ = base(tied)
    reference = copy.deepcopy(model)
    tokens, labels = batch(ids)
    reference(input_ids=tokens, labels=labels).loss.backward()

    wrapped = with_lora(model, ids)
    add_labelled_head(wrapped.get_base_model())
    n = int((labels[:, 1:] != -100).sum())
    output = wrapped(input_ids=tokens, labels=labels, label_weights=torch.full((n,), 1 / n))
    output.loss.backward()

    layers = {name: m for name, m in wrapped.named_modules() if type(m) is SparseTokensLayer}
    grads = {
        name.split(".")[-2]: layer.trainable_tokens_delta["default"].grad
        for name, layer in layers.items()
    }
    embedding = reference.get_input_embeddings().weight.grad[ids]
    assert torch.allclose(grads["embed_tokens"], embedding, atol=1e-5)
    assert embedding.abs().max() > 1e-3
    if not tied:
        head = reference.get_output_embeddings().weight.grad[ids]
        assert torch.allclose(grads["lm_head"], head, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_sparse_forward_equals_peft_s(tied: bool) -> None:
    model, _, ids, _ = base(tied)
    plain = with_lora(copy.deepcopy(model), ids, sparse=False).eval()
    sparse = with_lora(model, ids).eval()
    with torch.no_grad():
        for wrapped in (plain, sparse):
            for name, parameter in wrapped.named_parameters():
                if "trainable_tokens_delta" in name:
                    parameter += 0.3
        tokens, _ = batch(ids)
        gap = (plain(tokens).logits - sparse(tokens).logits).abs().max()
    assert gap < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_only_new_rows_change_in_training_and_merging(tied: bool, tmp_path: Any) -> None:
    model, _, ids, old = base(tied)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrapped = with_lora(model, ids)
    add_labelled_head(wrapped.get_base_model())
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    tokens, labels = batch(ids)
    n = int((labels[:, 1:] != -100).sum())
    for _ in range(3):
        loss = wrapped(input_ids=tokens, labels=labels, label_weights=torch.ones(n)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.eval()
    with torch.no_grad():
        unmerged = wrapped(tokens).logits
    wrapped.save_pretrained(tmp_path, save_embedding_layers=False)

    fresh, _, _, _ = base(tied)
    merged = PeftModel.from_pretrained(fresh, str(tmp_path)).merge_and_unload().eval()
    for module, name in (
        (merged.get_input_embeddings(), "model.embed_tokens.weight"),
        (merged.get_output_embeddings(), "lm_head.weight"),
    ):
        assert torch.equal(module.weight[:old], before[name][:old])
        assert not torch.allclose(module.weight[ids], before[name][ids], atol=1e-3)
    with torch.no_grad():
        assert (merged(tokens).logits - unmerged).abs().max() < 1e-4


def test_rows_stay_float32_where_the_base_is_bfloat16() -> None:
    model, _, ids, _ = base(tied=True)
    wrapped = with_lora(model.to(torch.bfloat16), ids, sparse=False)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
        assert parameter.dtype == torch.bfloat16, name
    make_rows_sparse(wrapped)
    rows = [p for n, p in wrapped.named_parameters() if "trainable_tokens_delta" in n]
    assert rows
    assert all(row.dtype == torch.float32 for row in rows)


@pytest.mark.parametrize("bias", [True, False])
def test_weighted_nll_matches_plain_autograd_over_several_chunks(bias: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=bias)
    transform = LogitTransform(scale=0.5, softcap=5.0)
    hidden = torch.randn(300, 16, requires_grad=True)
    targets, weights = torch.randint(0, 50, (300,)), torch.rand(300)

    loss, log_probs, is_top1 = weighted_nll(head, transform, hidden, targets, weights)
    loss.backward()
    found = [hidden.grad.clone(), *(p.grad.clone() for p in head.parameters())]
    hidden.grad = None
    head.zero_grad()
    logits = 5.0 * torch.tanh(head(hidden) * 0.5 / 5.0)
    nll = functional.cross_entropy(logits, targets, reduction="none")
    (weights * nll).sum().backward()
    expected = [hidden.grad, *(p.grad for p in head.parameters())]
    assert torch.allclose(loss, (weights * nll).sum())
    assert torch.allclose(log_probs, -nll, atol=1e-6)
    assert torch.equal(is_top1, logits.argmax(-1) == targets)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_lifting_gives_the_control_tokens_the_mass_and_keeps_their_differences(tied: bool) -> None:
    model, _, ids, old = base(tied)
    prompts = [[20 + i, 30, 40 + i, 50] for i in range(8)]

    def control_mass() -> float:
        with torch.no_grad():
            logits = torch.cat([model(torch.tensor([p])).logits[:, -1] for p in prompts])
        return logits.softmax(-1)[:, ids].sum(-1).mean().item()

    head = model.get_output_embeddings().weight
    before, frozen = head[ids].clone(), head[:old].clone()
    assert control_mass() < 0.1
    lift_rows(model, ids, prompts)
    assert control_mass() > 0.5
    assert torch.allclose(head[ids] - head[ids[0]], before - before[0], atol=1e-5)
    assert torch.equal(head[:old], frozen)
