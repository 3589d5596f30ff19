"""Find out from an epoch's means whether a network learns nothing."""

from __future__ import annotations

import math

COLLAPSED = 0.1  # spread of features below which they tell hardly any pictures apart
ABOVE = 1.02  # times the loss of equal scores: by this much a loss is above it
REMEDIES = "a lower learning rate, a higher temperature, and a larger batch or more negatives"


def finding(means: dict[str, float], equal_loss: float = math.inf, remedies: str = REMEDIES) -> str:
    """Return a warning where features have collapsed or the loss is worse than chance, or "".

    means: of an epoch. equal_loss: the loss of equal scores for all pairs. remedies: of the method.
    """
    spread = means.get("feature_spread", 1.0)
    loss = means.get("loss", 0.0)
    if spread < COLLAPSED:
        found = f"the features have collapsed (their spread is {spread:.3f} of 1)"
    elif loss > ABOVE * equal_loss:
        found = f"the loss {loss:.3f} is above that of equal scores, {equal_loss:.3f}"
    else:
        return ""
    return f"{found}, so the network learns nothing; usual remedies are {remedies}"
