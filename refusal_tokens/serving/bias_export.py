"""A policy as plain token biases, for servers and programs that know nothing of this package.

Only the rule ``bias`` is a bias on tokens. A stock server adds it at every position of a reply, so
all values are shifted to be at most zero: the differences between the control tokens, which decide,
stay as they are, and no control token becomes more likely inside a reply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from refusal_tokens.checkpoint import CheckpointInfo
from refusal_tokens.errors import InputError
from refusal_tokens.policy import Policy
from refusal_tokens.profiles import Profile, check_model
from refusal_tokens.rates import Rate, rate

SCHEMA_VERSION = 1
# What OpenAI's API and vLLM take; vLLM cuts off the rest without a word.
LOWEST = -100.0
LIMITS = (
    "rule: this is rule bias alone; route and threshold are no bias on tokens",
    "masking: a reply may open with any token; the rates count such replies apart",
    "bounds: the values lie within them, but whoever sends a request can send others",
    "sampled decisions: the rates are those of temperature 0",
    "user text: a server that is sent text turns a typed control token into the real one",
    "visibility: control tokens are special and do not show in the text; ask for token ids or "
    "log-probabilities to see the decision",
)


@dataclass(frozen=True)
class StockRates:
    """What the biases give on a stock server, greedily and unmasked, on a profile's prompts.

    Attributes:
        n: prompts.
        refused: share of refuse rows opened with any refusal token.
        over_refused: share of respond rows so opened.
        categories: category -> share of its refuse rows so opened.
        no_control_token: share of all rows that open with no control token.
    """

    n: int
    refused: Rate
    over_refused: Rate
    categories: Mapping[str, Rate]
    no_control_token: Rate

    def __str__(self) -> str:
        rows = [("refused, all refuse rows", self.refused)]
        rows += [(f"  {name}", share) for name, share in self.categories.items()]
        rows += [("over-refused, all respond rows", self.over_refused)]
        rows += [("opened with no control token", self.no_control_token)]
        return "\n".join(f"{name:32}{share}" for name, share in rows)


def token_biases(policy: Policy, info: CheckpointInfo) -> dict[int, float]:
    """Return a policy's biases by token id, nats, shifted so that the greatest is 0.

    Raises:
        InputError: for a policy that is no bias on tokens, or one that needs more than servers
            take.
    """
    taxonomy = info.taxonomy
    setting = policy.knobs(taxonomy)
    if setting.rule != "bias" and len(taxonomy.knobs) > 1:
        raise InputError(
            f"rule {setting.rule!r} cannot be said as a bias on tokens; allowed: a policy of rule "
            "bias (refusal-tokens target ... --rule bias), or the client in "
            "refusal_tokens.serving.client, which applies every rule"
        )
    if setting.temperature:
        raise InputError(
            f"temperature {setting.temperature}: a stock server decides at the text's temperature; "
            "allowed: a greedy policy (temperature 0)"
        )
    values = np.concatenate([[0.0], setting.bias])
    shifted = values - values.max()
    if shifted.min() < LOWEST:
        raise InputError(
            f"the biases lie {-shifted.min():.1f} nats apart; servers take at most {-LOWEST:.0f}"
        )
    # Adding 0 turns -0.0 into 0.0.
    return dict(zip(info.control_token_ids, (shifted + 0.0).tolist(), strict=True))


def stock_rates(profile: Profile, biases: Mapping[int, float], info: CheckpointInfo) -> StockRates:
    """Return the rates of shifted biases at temperature 0, with nothing masked.

    Raises:
        InputError: if the profile is of another model.
    """
    check_model(profile, info.model_fingerprint, info.taxonomy, "the profile")
    values = np.array([biases[number] for number in info.control_token_ids])
    control = profile.control_logits.astype(np.float64) + values
    opens = control.max(axis=1) > profile.rest_max
    refused = opens & (control.argmax(axis=1) > 0)
    asked, benign = profile.is_label("refuse"), profile.is_label("respond")

    def share(hit: np.ndarray, among: np.ndarray) -> Rate:
        return rate(int((hit & among).sum()), int(among.sum()))

    categories = {
        name: share(refused, asked & profile.is_category(name))
        for name in profile.taxonomy.category_ids
    }
    every = np.ones(len(profile), dtype=bool)
    return StockRates(
        n=len(profile),
        refused=share(refused, asked),
        over_refused=share(refused, benign),
        categories=categories,
        no_control_token=share(~opens, every),
    )


def logit_bias_json(
    policy: Policy, info: CheckpointInfo, biases: Mapping[int, float], rates: StockRates | None
) -> dict[str, Any]:
    """Return the file for OpenAI-compatible servers; ``logit_bias`` goes into every request.

    Keys are integer ids: llama.cpp splits spellings into pieces.
    """
    return {
        "logit_bias": {str(number): value for number, value in biases.items()},
        **_origin(policy, info, biases, rates),
    }


def generation_config_json(
    policy: Policy,
    info: CheckpointInfo,
    biases: Mapping[int, float],
    rates: StockRates | None,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a ``generation_config.json`` with the biases as transformers' ``sequence_bias``.

    Args:
        policy: where the biases come from.
        info: of the checkpoint.
        biases: shifted, by token id.
        rates: from ``stock_rates``.
        config: the checkpoint's own generation configuration, which is kept.
    """
    bias = [[[number], value] for number, value in biases.items()]
    origin = _origin(policy, info, biases, rates)
    return {**config, "sequence_bias": bias, "refusal_tokens": origin}


def _origin(
    policy: Policy, info: CheckpointInfo, biases: Mapping[int, float], rates: StockRates | None
) -> dict[str, Any]:
    tokens = dict(zip(map(str, info.control_token_ids), info.taxonomy.tokens, strict=True))
    return {
        "schema_version": SCHEMA_VERSION,
        "tokens": tokens,
        "shift": biases[info.control_token_ids[0]],
        "model_fingerprint": info.model_fingerprint,
        "taxonomy_hash": info.taxonomy.hash,
        "policy": policy.to_dict(),
        "rates": None if rates is None else asdict(rates),
        "cannot_express": list(LIMITS),
    }
