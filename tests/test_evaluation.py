"""What an evaluation says of planted replies, and replies and likelihoods of a tiny model."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from transformers import AutoModelForCausalLM

from refusal_tokens.checkpoint import load_checkpoint
from refusal_tokens.errors import InputError
from refusal_tokens.evaluate import Plan, generate_outcomes, writer_of
from refusal_tokens.evaluation import evaluate_outcomes
from refusal_tokens.evaluation_run import evaluate_model, spread
from refusal_tokens.fluency import fluency
from refusal_tokens.generation import Job, Writer, batches_of
from refusal_tokens.helpfulness import compare_with_base, find_base, perplexities
from refusal_tokens.likelihood import Answer, Likelihood, likelihoods
from refusal_tokens.outcomes import Outcome, read_outcomes, write_outcomes
from refusal_tokens.partial import Partial
from refusal_tokens.policy import Policy
from refusal_tokens.prefill import profile_rows
from refusal_tokens.rows import Row, read_rows
from refusal_tokens.steering import RefusalLogitsProcessor, SteeredModel
from refusal_tokens.taxonomy import RESPOND_TOKEN, default_taxonomy

TAXONOMY = default_taxonomy()
SAFETY, INCOMPLETE = "<|refuse:safety|>", "<|refuse:incomplete|>"


def reply(
    key: str, label: str, category: str | None, decision: str, verdict: str, **more: Any
) -> Outcome:
    values = {"forced": None, "text": "Some words.", **more}
    return Outcome(key, label, category, None, decision=decision, verdict=verdict, **values)


def test_own_decisions_are_counted_by_token_and_by_text() -> None:
    found = evaluate_outcomes(
        [
            reply("a", "refuse", "safety", SAFETY, "refused"),
            reply("b", "refuse", "safety", SAFETY, "answered"),
            reply("c", "refuse", "safety", RESPOND_TOKEN, "undecided"),
            reply("d", "respond", None, RESPOND_TOKEN, "partly"),
        ],
        TAXONOMY,
    )
    kinds = {kind.kind: kind for kind in found.kinds}
    assert list(kinds) == ["refuse safety", "ordinary", "all refuse", "all respond", "all"]
    safety = kinds["refuse safety"]
    assert (safety.by_token.count, safety.by_token.n) == (2, 3)
    assert (safety.by_text.count, safety.by_text.n, safety.undecided) == (1, 2, 1)
    assert (safety.agreement.count, safety.agreement.n) == (1, 3)
    assert kinds["ordinary"].partly == 1
    assert "refuse unsupported" in found.missing
    assert "near-miss safety" in found.missing


def test_adherence_parts_what_the_model_prefers_and_what_it_does_not() -> None:
    def forced(token: str, verdict: str, preferred: str, label: str, category: str) -> Outcome:
        return reply("x", label, category, token, verdict, forced=token, preferred=preferred)

    found = evaluate_outcomes(
        [
            forced(SAFETY, "refused", SAFETY, "refuse", "safety"),
            forced(SAFETY, "answered", INCOMPLETE, "respond", "safety"),
            forced(RESPOND_TOKEN, "answered", INCOMPLETE, "refuse", "incomplete"),
            forced(RESPOND_TOKEN, "refused", RESPOND_TOKEN, "refuse", "safety"),
            forced(RESPOND_TOKEN, "answered", RESPOND_TOKEN, "respond", "safety"),
        ],
        TAXONOMY,
    )
    lines = {(line.token, line.prompts): line for line in found.adherence}
    counts = {
        place: [(rate.count, rate.n) for rate in (line.preferred, line.not_preferred)]
        for place, line in lines.items()
        if line.preferred.n + line.not_preferred.n
    }
    assert counts == {
        (SAFETY, "all kinds"): [(1, 1), (0, 1)],
        ("all refusal tokens", "all kinds"): [(1, 1), (0, 1)],
        (RESPOND_TOKEN, "respond"): [(1, 1), (0, 0)],
        (RESPOND_TOKEN, "refuse incomplete, indeterminate, humanizing, unsupported"): [
            (0, 0),
            (1, 1),
        ],
        (RESPOND_TOKEN, "refuse safety"): [(0, 1), (0, 0)],
    }


def test_faults_of_the_text_are_found_and_a_reply_counts_once() -> None:
    again = "the cat sat down " * 3
    replies = [
        reply("a", "respond", None, RESPOND_TOKEN, "undecided", text=" …", tokens=1, ended=True),
        reply("b", "respond", None, RESPOND_TOKEN, "answered", text=again, tokens=9, ended=False),
        reply("c", "respond", None, RESPOND_TOKEN, "answered", tokens=5, ended=None),
    ]
    (found,) = fluency([*replies, *replies])
    assert (found.empty.count, found.empty.n) == (1, 3)
    assert (found.repeated.count, found.repeated.n) == (1, 3)
    assert (found.truncated.count, found.truncated.n) == (1, 2)
    assert found.mean_tokens == 5


def test_outcomes_without_the_later_columns_are_read(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = tmp_path / "o.parquet"
    whole = reply("a", "respond", None, RESPOND_TOKEN, "answered", tokens=3, ended=True)
    write_outcomes(path, [whole], {})
    assert read_outcomes(path)[0] == (whole,)
    pq.write_table(pq.read_table(path).drop_columns(["preferred", "tokens", "ended"]), path)
    (found,) = read_outcomes(path)[0]
    assert (found.preferred, found.tokens, found.ended) == (None, None, None)


def test_a_model_that_knows_twice_as_well_has_half_the_perplexity() -> None:
    rows = [Row(f"r{i}", (), "x", "respond", None, f"g{i // 2}") for i in range(8)]
    lengths = [3, 5, 2, 9, 4, 4, 1, 7]
    base = [Likelihood(n * math.log(6), n) for n in lengths]
    tuned = [Likelihood(n * math.log(3), n) for n in lengths]
    found = perplexities("ordinary", rows, base, tuned)
    assert (found.base, found.tuned) == (pytest.approx(6), pytest.approx(3))
    ratio = found.ratio
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))
    noisy = [Likelihood(n * math.log(6) + (-1) ** (i // 2), n) for i, n in enumerate(lengths)]
    ratio = perplexities("ordinary", rows, base, noisy).ratio
    assert ratio.low < ratio.value < ratio.high


def test_rows_are_taken_evenly() -> None:
    # Labels take turns, as the shipped rows do: an even step would see one of them.
    rows = [
        Row(str(i), (), None, ("refuse", "respond")[i % 2], ("a", "b")[i // 20], "g")
        for i in range(40)
    ]
    found = spread(rows, 8)
    assert Counter((row.label, row.category) for row in found) == dict.fromkeys(
        [(label, category) for label in ("refuse", "respond") for category in "ab"], 2
    )
    assert [int(row.id) for row in found] == sorted(int(row.id) for row in found)
    assert spread(rows, 99) == rows


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> SteeredModel:
    return SteeredModel(load_checkpoint(tiny_run, dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def rows(model: SteeredModel, rows_file: Path) -> list[Row]:
    return read_rows([rows_file], model.checkpoint.info.taxonomy)


def test_one_prompt_run_for_many_openings_gives_what_each_gives_alone(
    model: SteeredModel, rows: list[Row]
) -> None:
    info, encoder = model.checkpoint.info, model.checkpoint.encoder
    prompts = [tuple(encoder.prompt_ids(row.prompt)) for row in rows[:4]]
    jobs = [Job(prompt, (token,)) for prompt in prompts for token in info.control_token_ids]
    writer = writer_of(
        model, model.checkpoint.model, Plan(force=(), max_new_tokens=8),
        RefusalLogitsProcessor(info, Policy()),
    )  # fmt: skip
    together = writer.write(jobs)
    assert together == [writer.write([job])[0] for job in jobs]
    assert len({found.text for found in together}) > 4
    order = [i for batch in batches_of(jobs, 5) for i in batch]
    assert sorted(order) == list(range(len(jobs)))
    assert len(jobs[order[0]].prompt) == max(map(len, prompts))


def test_own_replies_are_those_of_generate_and_harm_is_not_asked_for(
    model: SteeredModel, rows: list[Row]
) -> None:
    profile = profile_rows(model.checkpoint, rows, progress=False)
    policy = Policy(bias={"safety": -0.2, "incomplete": 0.1}, rule="bias")
    plan = Plan(force=TAXONOMY.tokens, policy=policy, max_new_tokens=6, batch_size=7)
    outcomes = generate_outcomes(model, rows, profile, plan, Partial(None, "x"))
    own = [o for o in outcomes if o.forced is None]
    real = model.generate([r.prompt for r in rows], policy, max_new_tokens=7, do_sample=False)
    assert [o.text for o in own] == [found.text for found in real]
    assert len({o.text for o in own}) > 1
    assert [o.decision == RESPOND_TOKEN for o in own] == [f.decision == "respond" for f in real]
    answered = {o.id for o in outcomes if o.forced == RESPOND_TOKEN}
    assert {row.id for row in rows} - answered == {
        row.id for row in rows if (row.label, row.category) == ("refuse", "safety")
    }
    plan = Plan(force=TAXONOMY.tokens[:1], respond_to=frozenset(["safety"]), max_new_tokens=1)
    outcomes = generate_outcomes(model, rows, profile, plan, Partial(None, "x"))
    asked = {o.category for o in outcomes if o.forced and o.label == "refuse"}
    assert asked == {"safety"}


def test_what_the_model_prefers_is_its_decision_with_every_bias_at_0(
    model: SteeredModel, rows: list[Row]
) -> None:
    profile = profile_rows(model.checkpoint, rows, progress=False)
    places = [i % len(TAXONOMY.tokens) for i in range(len(rows))]
    planted = replace(profile, control_logits=4 * np.eye(len(TAXONOMY.tokens))[places])
    strict = Policy(rule="bias", bias={"safety": 50.0})
    plan = Plan(force=(SAFETY,), policy=strict, max_new_tokens=1)
    outcomes = generate_outcomes(model, rows, planted, plan, Partial(None, "x"))
    assert len(outcomes) == 2 * len(rows)
    assert {o.decision for o in outcomes} == {SAFETY}
    preferred = {row.id: TAXONOMY.tokens[i] for row, i in zip(rows, places, strict=True)}
    assert [o.preferred for o in outcomes] == [preferred[o.id] for o in outcomes]


def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    model: SteeredModel,
    rows: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = Plan(force=TAXONOMY.tokens, max_new_tokens=3, batch_size=10)
    whole = evaluate_model(model, rows, plan, tmp_path / "whole.parquet", base=None, limit=9)
    real, calls = Writer.write, []

    def interrupted(self: Writer, jobs: Any) -> Any:
        calls.append(len(jobs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, jobs)

    monkeypatch.setattr(Writer, "write", interrupted)
    output = tmp_path / "o.parquet"
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(model, rows, plan, output, base=None, limit=9)
    assert "20 finished parts are kept" in capsys.readouterr().err
    assert not output.exists()
    kept = tmp_path / "o.parquet.partial"
    # A line that the interruption cut off is done again.
    kept.write_text(kept.read_text() + '["half a li')
    found = evaluate_model(model, rows, plan, output, base=None, limit=9)
    assert found.report == whole.report
    generated = sum(calls[:2]) + sum(calls[3:])
    assert generated == len({(o.id, o.decision) for o in read_outcomes(output)[0]})
    assert not kept.exists()


@pytest.mark.parametrize(
    "change", ["nothing", "model", "system", "template", "dtype", "length", "prompts", "answers"]
)
def test_finished_replies_serve_the_same_work_alone(
    change: str,
    model: SteeredModel,
    tiny_run: Path,
    rows: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = Plan(force=TAXONOMY.tokens, max_new_tokens=2, batch_size=8)
    output, kept = tmp_path / "o.parquet", tmp_path / "o.parquet.partial"
    real, calls = Writer.write, []

    def interrupted(self: Writer, jobs: Any) -> Any:
        calls.append(len(jobs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, jobs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "write", interrupted)
        evaluate_model(model, rows, plan, output, base=None, limit=3)
    # Finished replies get another text, to be known again.
    head, *lines = kept.read_text().splitlines()
    parts = {name: ["Marked.", *rest] for name, (_, *rest) in map(json.loads, lines)}
    kept.write_text("".join(f"{line}\n" for line in (head, *map(json.dumps, parts.items()))))
    changed: dict[str, Any] = {
        "model": {"model_fingerprint": "another"},
        "system": {"system_prompt": "Be brief."},
        "template": {"chat_template_kwargs": {"enable_thinking": False}},
    }
    if change in changed:
        info = replace(model.checkpoint.info, **changed[change])
        model = SteeredModel(replace(model.checkpoint, info=info))
    elif change == "dtype":
        model = SteeredModel(load_checkpoint(tiny_run, dtype="bfloat16", device="cpu"))
    elif change == "length":
        plan = replace(plan, max_new_tokens=3)
    elif change == "prompts":
        rows = [replace(row, prompt=({"role": "user", "content": "Hello"},)) for row in rows]
    elif change == "answers":
        rows = [replace(row, response="Another.") for row in rows]
    evaluate_model(model, rows, plan, output, base=None, limit=3)
    outcomes, _ = read_outcomes(output)
    marked = {(o.id, o.decision) for o in outcomes if o.text == "Marked."}
    finished = {tuple(json.loads(name)[1:]) for name in parts}
    assert len(finished) == 8
    assert marked == (finished if change == "nothing" else set())
    assert len({(o.id, o.decision) for o in outcomes}) > len(finished)


def plain_nll(scoring: Any, before: Sequence[int], reply: Sequence[int]) -> float:
    """Of a reply's tokens, nats, from one forward of the whole."""
    with torch.no_grad():
        logits = scoring(torch.tensor([[*before, *reply]])).logits[0, len(before) - 1 : -1]
    shares = torch.log_softmax(logits.double(), dim=1)
    return -float(shares[torch.arange(len(reply)), torch.tensor(reply)].sum())


def test_likelihoods_are_those_of_a_plain_forward(model: SteeredModel, rows: list[Row]) -> None:
    encoder = model.checkpoint.encoder
    answers = {}
    for row in rows:
        if row.response is not None:
            prompt = encoder.prompt_ids(row.prompt)
            ids = (*prompt, *encoder.reply_ids(row.response))
            answers[row.id] = Answer(ids, len(prompt))
    found = likelihoods(model.checkpoint.model, answers, Partial(None, "x"), "answers")
    for name, answer in answers.items():
        before, reply_ids = answer.ids[: answer.start], answer.ids[answer.start :]
        wanted = plain_nll(model.checkpoint.model, before, reply_ids)
        assert found[name].nll == pytest.approx(wanted, abs=1e-3)
        assert found[name].tokens == len(answer.ids) - answer.start


def test_a_base_model_that_is_missing_or_another_is_named(
    model: SteeredModel, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"base model: model .*no such folder.*--base none"):
        find_base(str(tmp_path / "nope"), model.checkpoint)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|another|>"]})
    other = tmp_path / "other"
    tokenizer.save_pretrained(other)
    (other / "config.json").write_text("{}")
    with pytest.raises(InputError, match="<.another.>' has another id than in the checkpoint"):
        find_base(str(other), model.checkpoint)


def test_the_base_is_compared_on_the_same_tokens(
    model: SteeredModel, rows: list[Row], tmp_path: Path
) -> None:
    plan = Plan(force=(), max_new_tokens=3)
    name = model.checkpoint.info.base_model
    done = evaluate_model(model, rows, plan, tmp_path / "o.parquet", base=name, limit=99)
    assert done.helpfulness is not None
    kinds = {entry.kind: entry for entry in done.helpfulness.perplexity}
    assert {kind: entry.answers for kind, entry in kinds.items()} == {"ordinary": 1, "near-miss": 3}
    assert np.isfinite([entry.ratio.value for entry in kinds.values()]).all()
    assert done.helpfulness.base_replies is not None
    assert done.helpfulness.base_replies.refused.n <= 2
    plain, _ = read_outcomes(done.files["base"])
    assert {(o.forced, o.decision) for o in plain} == {(None, None)}


def test_answers_are_scored_after_respond_and_by_the_base_after_the_prompt(
    model: SteeredModel, rows: list[Row]
) -> None:
    checkpoint = model.checkpoint
    base = find_base(checkpoint.info.base_model, checkpoint)
    plan = Plan(force=(), max_new_tokens=1)
    compared, replies = compare_with_base(model, base, rows, [], plan, Partial(None, "x"))
    assert (replies, compared.base_replies, compared.tuned_replies) == ([], None, None)
    found = next(entry for entry in compared.perplexity if entry.kind == "ordinary")
    (row,) = (r for r in rows if r.label == "respond" and r.category is None and r.response)
    prompt, answer = (
        checkpoint.encoder.prompt_ids(row.prompt),
        checkpoint.encoder.reply_ids("Four."),
    )
    assert row.response == "Four."
    assert found.tokens == len(answer)
    untuned = AutoModelForCausalLM.from_pretrained(base.source, dtype=torch.float32).eval()
    of_base = math.exp(plain_nll(untuned, prompt, answer) / len(answer))
    # After each control token in turn, `<|respond|>` first.
    tuned, *others = [
        math.exp(plain_nll(checkpoint.model, [*prompt, control], answer) / len(answer))
        for control in checkpoint.info.control_token_ids
    ]
    assert (found.base, found.tuned) == pytest.approx((of_base, tuned), rel=1e-4)
    assert found.ratio.value == pytest.approx(tuned / of_base, rel=1e-4)
    # Any of the others in their place would show: they differ by more than the tolerance.
    assert min(abs(math.log(tuned / other)) for other in (of_base, *others)) > 2e-4
