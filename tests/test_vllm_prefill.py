"""Reading vLLM's log-probabilities, from planted ones of the same shape; no vLLM is needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from refusal_tokens.prefill import Results
from refusal_tokens.vllm_prefill import _read

# Neither sorted nor side by side, as the ids of a tokenizer with spare rows may be.
CONTROL_IDS = [17, 3, 11]
VOCABULARY = 20


@dataclass(frozen=True)
class Logprob:
    """As ``vllm.logprobs.Logprob``."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True)
class Completion:
    """What is read of ``vllm.outputs.CompletionOutput``."""

    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]


def completion(log_probs: np.ndarray) -> Completion:
    """One prompt's answer: the best of the rest is sampled, and all that is named is listed."""
    rest = np.delete(np.arange(VOCABULARY), CONTROL_IDS)
    best = int(rest[log_probs[rest].argmax()])
    # The listing has an order of its own.
    listed = {token: Logprob(float(log_probs[token])) for token in sorted([best, *CONTROL_IDS])}
    return Completion([best], [listed])


def test_log_probabilities_are_read_in_the_order_of_the_taxonomy() -> None:
    log_probs = log_softmax(np.random.default_rng(0).normal(0, 2, (3, VOCABULARY)), axis=1)
    results = Results.empty(3, len(CONTROL_IDS), [1.0])
    for row in (2, 0):
        _read(results, row, CONTROL_IDS, completion(log_probs[row]))
    assert results.done.tolist() == [True, False, True]
    rest = np.delete(log_probs, CONTROL_IDS, axis=1)
    for row in (2, 0):
        assert results.control[row] == pytest.approx(log_probs[row, CONTROL_IDS], abs=1e-5)
        assert results.rest_max[row] == pytest.approx(rest[row].max(), abs=1e-5)
        assert results.rests[row, 0] == pytest.approx(logsumexp(rest[row]), abs=1e-5)
    assert not results.control[1].any()


def test_rounding_leaves_the_rest_no_less_than_its_largest_part() -> None:
    # As a model after training: the control tokens hold all of the mass, by rounding even more.
    log_probs = np.full(VOCABULARY, -30.0)
    log_probs[CONTROL_IDS] = np.log([0.5, 0.3, 0.2]) + 1e-7
    log_probs[5] = -20.0
    results = Results.empty(1, len(CONTROL_IDS), [1.0])
    _read(results, 0, CONTROL_IDS, completion(log_probs))
    assert results.rest_max[0] == results.rests[0, 0] == np.float32(-20.0)
