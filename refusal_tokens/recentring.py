"""The logit bias that a new mix of traffic asks for, estimated without labels."""

from __future__ import annotations

import numpy as np

from refusal_tokens.arrays import Floats
from refusal_tokens.decision import Knobs, probabilities
from refusal_tokens.errors import InputError
from refusal_tokens.profiles import Profile


def recentre(
    profile: Profile, traffic: Profile, iterations: int = 1000
) -> tuple[Floats, Floats, Floats]:
    """Estimate a traffic's mix of labels without labels, and the logit bias that fits it.

    Expectation maximisation on the control probabilities (Saerens, Latinne and Decaestecker 2002).
    It takes the probabilities to be calibrated on the profile, and the kinds of prompt to be the
    same in both but for their shares; where they are not, the estimate is off.

    Args:
        profile: labelled; gives the mix that the model is calibrated to.
        traffic: of the same model; labels are not used.
        iterations: at most.

    Returns:
        Shares of each control token's label in the profile, estimated shares in the traffic, both
        (1 + categories,), and the bias per knob that Bayes' rule asks for, in nats.

    Raises:
        InputError: if a label has no rows in the profile.
    """
    wanted = profile.token_index
    before = np.bincount(wanted[wanted >= 0], minlength=profile.control_logits.shape[1])
    if not before.all():
        lacking = [
            token for token, count in zip(profile.taxonomy.tokens, before, strict=True) if not count
        ]
        raise InputError(f"re-centring: the profile has no rows labelled {', '.join(lacking)}")
    prior = before / before.sum()
    zero = np.zeros(len(prior) - 1)
    chances = probabilities(traffic.control_logits, Knobs("bias", zero, zero - np.inf, 1.0))
    shares = prior.copy()
    for _ in range(iterations):
        weighted = chances * (shares / prior)
        new = (weighted / weighted.sum(axis=1, keepdims=True)).mean(axis=0)
        if np.abs(new - shares).max() < 1e-9:
            break
        shares = new
    # A share that has run to 0 would ask for a bias without end.
    held = np.maximum(shares, 1e-6)
    ratio = np.log(held / prior)
    return prior, shares, ratio[1:] - ratio[0]
