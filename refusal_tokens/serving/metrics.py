"""A Prometheus counter of decisions, on the server's own ``/metrics``."""

from __future__ import annotations

from functools import lru_cache

from refusal_tokens.serving.replies import Record


@lru_cache(maxsize=1)
def decision_counter() -> Record:
    """Return a function that counts a decision by category and policy."""
    from prometheus_client import Counter

    counter = Counter(
        "refusal_tokens_decisions",
        "Replies by decision: respond, or the category of a refusal.",
        ["category", "policy"],
    )

    def record(category: str, policy: str) -> None:
        counter.labels(category=category, policy=policy).inc()

    return record
