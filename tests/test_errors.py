"""The one input error, its nearest names, and modules that must not load torch."""

from __future__ import annotations

from refusal_tokens.errors import InputError, nearest, one_message, unknown


def test_the_nearest_name_is_offered_and_a_far_one_is_not() -> None:
    assert nearest("safty", ["incomplete", "safety"]) == " (did you mean 'safety'?)"
    assert nearest("zzz", ["incomplete", "safety"]) == ""


def test_unknown_says_what_was_found_and_all_that_is_allowed() -> None:
    assert unknown("rule", "rout", ["route", "bias"]) == (
        "unknown rule 'rout' (did you mean 'route'?); allowed: route, bias"
    )


def test_one_fault_stands_alone_and_several_are_counted() -> None:
    assert str(one_message(["a: wrong"], "rows")) == "a: wrong"
    several = one_message(["a: wrong", "b: wrong"], "rows")
    assert isinstance(several, InputError)
    assert str(several) == "2 faults in rows:\n  a: wrong\n  b: wrong"
