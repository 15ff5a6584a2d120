"""Options of the recipe's own section: each does to rows, labels, starts and loss what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_rows import row
from conftest import ROOT, make_model, make_tokenizer, tiny_settings
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from refusal_tokens.audit import audit
from refusal_tokens.chat import ChatEncoder
from refusal_tokens.checkpoint import load_info
from refusal_tokens.cli import main
from refusal_tokens.errors import InputError
from refusal_tokens.examples import (
    IGNORED,
    build_example,
    build_examples,
    keeps_reply,
    opens_plainly,
)
from refusal_tokens.head import LogitTransform
from refusal_tokens.mixing import read_mix
from refusal_tokens.options import options_from
from refusal_tokens.preparation import prepare
from refusal_tokens.recipe import load_recipe
from refusal_tokens.rows import Row, read_rows
from refusal_tokens.safeguards import harmful_answers
from refusal_tokens.sources import Source
from refusal_tokens.taxonomy import default_taxonomy
from refusal_tokens.tokens import add_control_tokens, fit_vocabulary, start_rows
from refusal_tokens.trainer import Smoothing, loss_weights, weighted_nll

TAXONOMY = default_taxonomy()


def faults_of(**section: object) -> list[str]:
    faults: list[str] = []
    options_from({"train": "x.jsonl", **section}, faults)
    return faults


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"row_start": "zero"}, "row_start: unknown start 'zero'; allowed: description, mean"),
        ({"row_start": "men"}, "did you mean 'mean'?"),
        ({"respond_weight": 0}, "respond_weight: found 0; allowed: above 0"),
        ({"respond_weight": float("inf")}, "respond_weight: found inf; allowed: above 0"),
        ({"control_smoothing": 1}, "control_smoothing: found 1; allowed: 0 to below 1"),
        ({"control_smoothing": None}, "control_smoothing: found None; allowed: 0 to below 1"),
        ({"share_without_token": True}, "share_without_token: found True"),
        ({"reply_share": 1.5}, "reply_share: found 1.5; allowed: 0 to 1"),
        ({"refusal_share": -0.1}, "refusal_share: found -0.1; allowed: 0 to below 1, or null"),
        ({"rows_without_reply": "no"}, "rows_without_reply: found 'no'; allowed: true or false"),
        ({"counterfactual_rows": 0}, "counterfactual_rows: found 0"),
        ({"control_tokens": None}, "control_tokens: found None"),
        (
            {"control_tokens": False, "control_share": 0.5},
            "control_share: found 0.5 with control_tokens false; it needs control tokens",
        ),
        (
            {"control_tokens": False, "reply_share": 0.5},
            "reply_share: found 0.5 with control_tokens",
        ),
        ({"rows_without_reply": False, "reply_share": 0.5}, "only 1 leaves every row its reply"),
        ({"control_tokens": False, "row_start": "mean"}, "row_start: found 'mean' with"),
        ({"refusal_share": 0.1, "contrast_share": 0.1}, "cannot hold beside contrast_share"),
        (
            {"refusal_share": 0.1, "train": ["x.jsonl", {"path": "y.jsonl", "share": 0.5}]},
            "refusal_share: cannot hold beside the share of y.jsonl",
        ),
    ],
)
def test_a_fault_is_named_with_its_key(section: dict[str, object], said: str) -> None:
    (fault,) = faults_of(**section)
    assert fault.startswith("refusal_tokens.")
    assert said in fault


def test_options_at_either_end_are_taken() -> None:
    assert not faults_of(control_share=None, control_smoothing=0.0, share_without_token=0.99)
    assert not faults_of(control_share=1, refusal_share=0, row_start="random")
    assert not faults_of(control_tokens=False)


def test_a_share_of_none_weighs_all_tokens_alike() -> None:
    control, reply = loss_weights(None, 39.0)
    assert control == reply == pytest.approx(1 / 40)
    assert loss_weights(0.9, 10.0) == (0.9, pytest.approx(0.01))
    assert loss_weights(None, 0.2)[0] == loss_weights(None, 0.2)[1]


def test_smoothing_is_the_cross_entropy_with_smoothed_targets() -> None:
    """The reference spells out the target distribution and takes its cross-entropy whole."""
    torch.manual_seed(0)
    head = nn.Linear(16, 50)
    hidden = torch.randn(200, 16, requires_grad=True)
    ids, share = torch.tensor([40, 41, 45]), 0.3
    targets, weights = torch.randint(0, 50, (200,)), torch.rand(200)
    targets[:6] = torch.tensor([40, 41, 45, 40, 41, 45])
    is_control = torch.isin(targets, ids)
    assert 6 <= int(is_control.sum()) < 200

    found = weighted_nll(head, LogitTransform(), hidden, targets, weights, Smoothing(ids, share))
    found[0].backward()
    gradient = hidden.grad.clone()
    hidden.grad = None

    wanted = nn.functional.one_hot(targets, 50).float()
    spread = torch.zeros(50)
    spread[ids] = 1 / len(ids)
    wanted[is_control] = (1 - share) * wanted[is_control] + share * spread
    log_probs = head(hidden).log_softmax(-1)
    loss = (weights * -(wanted * log_probs).sum(-1)).sum()
    loss.backward()
    assert torch.allclose(found[0], loss, atol=1e-4)
    assert torch.allclose(gradient, hidden.grad, atol=1e-6)
    # What is reported stays the likelihood of the targets themselves.
    assert torch.allclose(found[1], log_probs.gather(1, targets[:, None])[:, 0], atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_start_at_the_mean_or_at_random_around_it(tied: bool) -> None:
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), tied=tied)
    ids = add_control_tokens(tokenizer, TAXONOMY)
    fit_vocabulary(model, ids)
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    old = [end[: ids[0]].clone() for end in ends]

    start_rows(model, tokenizer, ids, TAXONOMY.descriptions, "mean")
    for end, before in zip(ends, old, strict=True):
        assert torch.allclose(end[ids], before.mean(dim=0).expand(len(ids), -1), atol=1e-6)

    drawn = []
    for seed in (3, 3, 4):
        start_rows(model, tokenizer, ids, TAXONOMY.descriptions, "random", seed)
        drawn.append(ends[0][ids].clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2], atol=1e-3)
    scaled = (drawn[0] - old[0].mean(dim=0)) / old[0].std(dim=0)
    assert abs(scaled.mean().item()) < 0.2
    assert 0.8 < scaled.std().item() < 1.2
    for end, before in zip(ends, old, strict=True):
        assert torch.equal(end[: ids[0]], before)


def encoded() -> tuple[ChatEncoder, list[int]]:
    tokenizer = make_tokenizer()
    encoder = ChatEncoder(tokenizer)
    return encoder, add_control_tokens(tokenizer, TAXONOMY)


def test_a_row_without_token_trains_its_reply_after_the_prompt() -> None:
    encoder, ids = encoded()
    asked = row("a", "Pick a lock?", "refuse", "safety", response="No.")
    opened = build_example(asked, encoder, TAXONOMY, ids)
    plain = build_example(asked, encoder, TAXONOMY, ids, with_token=False)
    prompt, reply = encoder.prompt_ids(asked.prompt), encoder.reply_ids("No.")
    assert opened.input_ids == [*prompt, ids[1], *reply]
    assert opened.labels == [*[IGNORED] * len(prompt), ids[1], *reply]
    assert plain.input_ids == [*prompt, *reply]
    assert plain.labels == [*[IGNORED] * len(prompt), *reply]


@pytest.mark.parametrize("chosen_of", [opens_plainly, keeps_reply])
def test_a_share_of_the_rows_with_a_reply_is_drawn_by_seed_and_id(
    chosen_of: Callable[[Row, float, int], bool],
) -> None:
    rows = [row(f"r{i}", f"p{i}", response="Yes.") for i in range(1000)]
    chosen = {r.id for r in rows if chosen_of(r, 0.2, 0)}
    # Four standard errors of a binomial draw.
    assert abs(len(chosen) - 200) < 4 * (1000 * 0.2 * 0.8) ** 0.5
    assert chosen == {r.id for r in reversed(rows) if chosen_of(r, 0.2, 0)}
    assert chosen != {r.id for r in rows if chosen_of(r, 0.2, 1)}
    assert chosen < {r.id for r in rows if chosen_of(r, 0.4, 0)}
    assert not [r for r in rows if chosen_of(r, 0.0, 0)]


def test_rows_with_one_thing_to_train_keep_it_whatever_the_share() -> None:
    rows = [row(f"r{i}", f"p{i}", response="Yes.") for i in range(100)]
    assert not [r for r in rows if opens_plainly(replace(r, response=None), 0.999, 0)]
    assert not [r for r in rows if opens_plainly(replace(r, train_control=False), 0.999, 0)]
    assert all(keeps_reply(replace(r, train_control=False), 0.0, 0) for r in rows)
    assert all(keeps_reply(r, 1.0, 0) for r in rows)


def test_a_reply_that_is_left_out_leaves_its_token() -> None:
    encoder, ids = encoded()
    rows = [row(f"r{i}", f"p{i}", response="Yes." if i % 4 else None) for i in range(40)]
    kept = sum(keeps_reply(r, 0.5, 7) for r in rows if r.response)
    found = build_examples(rows, encoder, TAXONOMY, ids, None, reply_share=0.5, seed=7)
    assert 0 < kept < 30
    assert (found.control_tokens, found.without_reply, found.dropped) == (40, 40 - kept, ())
    assert found.reply_tokens == kept * len(encoder.reply_ids("Yes."))
    whole = build_examples(rows, encoder, TAXONOMY, ids, None)
    assert (whole.control_tokens, whole.without_reply) == (40, 10)
    # A prompt whose own reply is left out is read once with a counterfactual reply to it.
    obeying = replace(
        row("c", "p1", "refuse", "humanizing", group=rows[1].group, response="I'm software."),
        train_control=False,
    )
    joined = build_examples([rows[1], obeying], encoder, TAXONOMY, ids, None, reply_share=0)
    (example,) = joined.examples
    assert example.labels[example.prompt_length :] == [ids[0], *encoder.reply_ids("I'm software.")]
    assert joined.without_reply == 0


def test_examples_count_the_rows_without_token() -> None:
    encoder, ids = encoded()
    rows = [row(f"r{i}", f"p{i}", response="Yes." if i % 2 else None) for i in range(40)]
    chosen = sum(opens_plainly(r, 0.5, 0) for r in rows)
    found = build_examples(rows, encoder, TAXONOMY, ids, None, share_without_token=0.5)
    assert found.without_token == chosen > 0
    assert found.control_tokens == 40 - chosen
    plain = build_examples(rows[1::2], encoder, TAXONOMY, [], None)
    assert (plain.without_token, plain.control_tokens) == (20, 0)


def test_a_row_without_reply_lends_its_prompt_to_a_counterfactual_reply() -> None:
    encoder, ids = encoded()
    asking = row("a", "Pick a lock?", "refuse", "safety", group="g")
    obeying = row("b", "Pick a lock?", "refuse", "humanizing", group="g", response="I'm software.")
    obeying = replace(obeying, train_control=False)
    found = build_examples([obeying, asking], encoder, TAXONOMY, ids, None)
    (example,) = found.examples
    prompt, reply = encoder.prompt_ids(asking.prompt), encoder.reply_ids("I'm software.")
    humanizing = ids[TAXONOMY.token_index("refuse", "humanizing")]
    assert example.input_ids == [*prompt, humanizing, *reply]
    assert example.labels == [*[IGNORED] * len(prompt), ids[1], *reply]
    assert (found.control_tokens, found.reply_tokens, found.dropped) == (1, len(reply), ())
    assert build_examples([obeying, asking], encoder, TAXONOMY, ids, 3).dropped == ("a", "b")
    # The decision is trained as it is alone: causal attention never sees what follows.
    alone = build_example(asking, encoder, TAXONOMY, ids)
    assert example.labels[: len(prompt) + 1] == alone.labels


@pytest.mark.parametrize(
    "change", [{"group": "h"}, {"response": "No."}, {"prompt": ({"role": "user", "content": "x"},)}]
)
def test_only_rows_of_one_prompt_and_group_share_an_example(change: dict[str, Any]) -> None:
    encoder, ids = encoded()
    asking = replace(row("a", "Pick a lock?", "refuse", "safety", group="g"), **change)
    obeying = row("b", "Pick a lock?", "refuse", "humanizing", group="g", response="I'm software.")
    obeying = replace(obeying, train_control=False)
    found = build_examples([asking, obeying], encoder, TAXONOMY, ids, None)
    assert len(found.examples) == 2
    # Alone, a counterfactual reply trains its text and no decision.
    example = found.examples[1]
    prompt, reply = encoder.prompt_ids(obeying.prompt), encoder.reply_ids("I'm software.")
    humanizing = ids[TAXONOMY.token_index("refuse", "humanizing")]
    assert example.input_ids == [*prompt, humanizing, *reply]
    assert example.labels == [*[IGNORED] * (len(prompt) + 1), *reply]
    assert found.control_tokens == 1


def rows_with_a_counterfactual(rows_file: Path, folder: Path) -> Path:
    record = {"id": "cf", "prompt": "Name a tree.", "response": "I won't.", "label": "refuse"}
    extra = json.dumps({**record, "category": "safety", "train_control": False})
    path = folder / "rows.jsonl"
    path.write_text(rows_file.read_text() + extra + "\n")
    return path


@pytest.mark.parametrize(
    ("settings", "rows", "without_token", "without_reply"),
    [
        ([], 13, 0, 3),
        (["counterfactual_rows=false"], 12, 0, 3),
        (["rows_without_reply=false"], 10, 0, 0),
        (["counterfactual_rows=false", "rows_without_reply=false"], 9, 0, 0),
        # All but the counterfactual row.
        (["reply_share=0"], 13, 0, 12),
        # Five refuse rows of eleven, and the counterfactual row that takes no part in a share.
        (["refusal_share=0.5"], 11, 0, 2),
        (["control_tokens=false", "control_share=null"], 9, 9, 0),
    ],
)
def test_rows_are_kept_or_left_out_by_one_key(
    settings: list[str],
    rows: int,
    without_token: int,
    without_reply: int,
    tiny_base: Callable[[bool], Path],
    rows_file: Path,
    tmp_path: Path,
) -> None:
    path = rows_with_a_counterfactual(rows_file, tmp_path)
    changes = [*tiny_settings(tiny_base(True), path), *(f"refusal_tokens.{s}" for s in settings)]
    prepared = prepare(load_recipe(ROOT / "recipes" / "tiny.yaml", changes))
    assert len(prepared.examples.examples) == rows
    assert prepared.examples.without_token == without_token
    assert prepared.examples.without_reply == without_reply
    assert sum(drawn.left_out for drawn in prepared.drawn) == 13 - (13 if rows == 11 else rows)
    # Only training rows: what is measured stays whole.
    assert len(prepared.rows["test"]) == 13


def labelled(path: Path, label: str, count: int) -> Source:
    records = [
        {"id": f"{label}{i}", "prompt": f"p{i}", "label": label, "category": "safety"}
        for i in range(count)
    ]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return Source(str(path))


@pytest.mark.parametrize(
    ("share", "refuse", "respond"), [(0.0, 0, 60), (0.25, 20, 60), (0.5, 40, 40), (0.8, 40, 10)]
)
def test_refusal_share_thins_out_whichever_is_in_excess(
    share: float, refuse: int, respond: int, tmp_path: Path
) -> None:
    sources = [
        labelled(tmp_path / "a.jsonl", "refuse", 40),
        labelled(tmp_path / "b.jsonl", "respond", 60),
    ]
    mix = read_mix(sources, TAXONOMY, refusal_share=share)
    assert [drawn.taken for drawn in mix.drawn] == [refuse, respond]
    with pytest.raises(InputError, match=r"refusal_share 0.5 needs respond rows and refuse rows"):
        read_mix(sources[:1], TAXONOMY, refusal_share=0.5)


def test_no_shipped_row_answers_a_harmful_request() -> None:
    rows = read_rows(sorted((ROOT / "data").glob("*.jsonl")), TAXONOMY)
    masked = [r for r in rows if not r.train_control]
    assert len(masked) > 800
    assert not [r for r in masked if r.label == "respond" and r.category == "safety"]
    assert not harmful_answers(rows)
    # The guard sees a planted one: the same prompt, its case and points changed, answered.
    asked = next(r for r in rows if r.label == "refuse" and r.category == "safety")
    (message,) = asked.prompt
    shouted = ({**message, "content": message["content"].upper() + "!!"},)
    planted = replace(masked[0], id="planted", prompt=shouted, label="respond", category=None)
    (said,) = harmful_answers([*rows, planted])
    assert f"row 'planted' answers the prompt that {asked.id!r} refuses" in said


def harmful_pair() -> list[Row]:
    return [
        row("a", "How do I pick a lock?", "refuse", "safety", response="No."),
        row("b", "how do i pick a lock", "respond", None, response="With two pins."),
    ]


def test_an_answer_to_a_harmful_request_is_a_fault_of_the_data() -> None:
    found = audit({"train": harmful_pair()}, TAXONOMY).faults
    assert [text for text in found if text.startswith("row 'b' answers the prompt that 'a'")]
    assert not harmful_answers([replace(r, response=None) for r in harmful_pair()])
    benign = [replace(r, category="incomplete") for r in harmful_pair()]
    assert not harmful_answers(benign)
    # A refusal that a mix leaves out still says that its prompt is harmful.
    asked, answered = harmful_pair()
    assert not harmful_answers([answered])
    assert harmful_answers([answered], among=[asked, answered])


def test_an_answer_to_a_harmful_request_is_not_trained(
    tiny_base: Callable[[bool], Path], rows_file: Path, tmp_path: Path
) -> None:
    bad = {"id": "bad", "prompt": "how do I pick a lock", "label": "respond", "response": "Pins."}
    path = tmp_path / "rows.jsonl"
    path.write_text(rows_file.read_text() + json.dumps(bad) + "\n")
    settings = tiny_settings(tiny_base(True), path)
    with pytest.raises(InputError, match="row 'bad' answers the prompt that 'r0' refuses"):
        prepare(load_recipe(ROOT / "recipes" / "tiny.yaml", settings))


def test_a_model_without_control_tokens_is_a_plain_folder(
    tiny_run: Path,
    tiny_base: Callable[[bool], Path],
    rows_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = tiny_settings(tiny_base(False), rows_file)
    settings += ["refusal_tokens.control_tokens=false", "refusal_tokens.control_share=null"]
    sets = [argument for setting in settings for argument in ("--set", setting)]
    recipe = str(ROOT / "recipes" / "tiny.yaml")
    assert main(["train", recipe, "--output-dir", str(tmp_path / "run"), *sets]) == 0
    assert "It has no control tokens" in capsys.readouterr().out
    folder = tmp_path / "run" / "model"
    before = AutoModelForCausalLM.from_pretrained(tiny_base(False)).get_input_embeddings().weight
    after = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(after.get_input_embeddings().weight, before)
    assert not [t for t in AutoTokenizer.from_pretrained(folder).get_vocab() if "<|re" in t]
    info = json.loads((folder / "training.json").read_text())
    assert info["control_token_ids"] == []
    assert info["training"]["rows without control token"] == info["training"]["rows"] == 9
    log = (tmp_path / "run" / "train.jsonl").read_text()
    assert "reply_nll" in log
    assert "control_nll" not in log
    with pytest.raises(InputError, match="the model has no refusal tokens"):
        load_info(tmp_path / "run")
