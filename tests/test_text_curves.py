"""Text-level curves: planted texts, every rule, and what pairs that do not fit are told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from planted import normal_profile

from refusal_tokens.curves import control_curve
from refusal_tokens.decision import RULES, Knobs, decide, knobs, probabilities
from refusal_tokens.errors import InputError
from refusal_tokens.outcomes import Outcome
from refusal_tokens.profiles import Profile
from refusal_tokens.report import build_report
from refusal_tokens.text_curves import ForcedTexts, forced_texts, text_curve, text_refusal

BIAS = np.linspace(-4, 4, 17)
SETTINGS = [knobs(rule, [0.7, -0.4], t) for rule in RULES for t in (0.0, 0.8)]


def planted(prompts: int = 60) -> tuple[Profile, list[Outcome], dict[str, Any]]:
    """A profile and a forced reply for each prompt and token, refusing at random."""
    profile = normal_profile(prompts)
    metadata = {**profile.metadata, "data_hash": "d00"}
    columns = {**profile.columns, "id": np.array([f"r{i}" for i in range(prompts)], object)}
    profile = replace(profile, metadata=metadata, columns=columns)
    random = np.random.default_rng(1)
    outcomes = []
    for i in range(prompts):
        label, category = columns["label"][i], columns["category"][i]
        for token in profile.taxonomy.tokens:
            verdict = "refused" if random.random() < 0.5 else "answered"
            outcomes.append(Outcome(f"r{i}", label, category, None, token, token, "x", verdict))
    return profile, outcomes, metadata


def obedient(outcomes: list[Outcome]) -> list[Outcome]:
    verdict = {True: "answered", False: "refused"}
    return [replace(o, verdict=verdict[o.forced == "<|respond|>"]) for o in outcomes]


def texts_of(profile: Profile, outcomes: list[Outcome], metadata: dict[str, Any]) -> ForcedTexts:
    return forced_texts(profile, outcomes, metadata, "p and o")


@pytest.mark.parametrize("setting", SETTINGS)
def test_texts_that_obey_give_the_curve_by_token(setting: Knobs) -> None:
    profile, outcomes, metadata = planted()
    texts = texts_of(profile, obedient(outcomes), metadata)
    for knob in profile.taxonomy.knobs:
        by_text = text_curve(texts, knob, setting, BIAS)
        by_token = control_curve(profile, knob, setting, BIAS)
        for name in ("refusal", "low", "high", "near_miss"):
            assert getattr(by_text, name) == pytest.approx(getattr(by_token, name), abs=1e-9)
        assert (by_text.n_refuse, by_text.n_near) == (by_token.n_refuse, by_token.n_near)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_weighs_each_reply_with_its_decision(setting: Knobs) -> None:
    profile, outcomes, metadata = planted()
    # The order of the file says nothing.
    texts = texts_of(profile, outcomes[::-1], metadata)
    refuses = {(o.id, o.forced): o.verdict == "refused" for o in outcomes}
    chances = probabilities(profile.control_logits, setting)
    wanted = [
        sum(p * refuses[f"r{i}", t] for p, t in zip(row, profile.taxonomy.tokens, strict=True))
        for i, row in enumerate(chances)
    ]
    assert text_refusal(texts, setting) == pytest.approx(np.array(wanted))
    if setting.temperature == 0:
        opened = decide(profile.control_logits, setting)
        real = [refuses[f"r{i}", profile.taxonomy.tokens[k]] for i, k in enumerate(opened)]
        assert text_refusal(texts, setting) == pytest.approx(np.array(real, float))


def test_prompts_without_every_reply_are_left_out_and_counted() -> None:
    profile, outcomes, metadata = planted()
    harmful = [o for o in outcomes if (o.label, o.category) == ("refuse", "a")]
    kept = [o for o in outcomes if o not in harmful or o.forced != "<|respond|>"]
    texts = texts_of(profile, kept, metadata)
    assert texts.left_out == len(harmful) / len(profile.taxonomy.tokens)
    assert len(texts.profile) + texts.left_out == len(profile)
    curve = text_curve(texts, "a", SETTINGS[0], BIAS)
    assert curve.n_refuse == 0
    assert np.isnan(curve.refusal).all()
    assert curve.n_near > 0


def test_undecided_replies_are_counted() -> None:
    profile, outcomes, metadata = planted()
    texts = texts_of(profile, [replace(o, verdict="undecided") for o in outcomes], metadata)
    assert texts.undecided == len(outcomes)
    assert text_refusal(texts, SETTINGS[0]).max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_fingerprint": "other"}, "different model .model_fingerprint f00 and other"),
        ({"data_hash": "other"}, "different prompts .data_hash d00 and other"),
    ],
)
def test_files_that_do_not_fit_are_refused_naming_both_hashes(
    change: dict[str, str], message: str
) -> None:
    profile, outcomes, metadata = planted(8)
    with pytest.raises(InputError, match=message):
        texts_of(profile, outcomes, metadata | change)


def test_replies_that_do_not_fit_are_named() -> None:
    profile, outcomes, metadata = planted(8)
    with pytest.raises(InputError, match="no prompt has a reply under each of"):
        texts_of(profile, [o for o in outcomes if o.forced == "<|respond|>"], metadata)
    with pytest.raises(InputError, match="two replies for prompt 'r0', <|respond|>"):
        texts_of(profile, [*outcomes, outcomes[0]], metadata)
    with pytest.raises(InputError, match="prompt 'nope' with .* is not in the profile"):
        texts_of(profile, [*outcomes, replace(outcomes[0], id="nope")], metadata)


def test_a_report_holds_both_curves() -> None:
    profile, outcomes, metadata = planted()
    texts = texts_of(profile, obedient(outcomes), metadata)
    report = build_report({"m": profile}, knobs("route", [0.0, 0.0]), texts={"m": texts})
    found = report.analyses[0].text
    assert found is not None
    assert [curve.knob for curve in found.curves] == ["a", "b"]
    assert found.by_text == found.by_token
