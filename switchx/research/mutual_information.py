"""Mutual information of what tokens are and where they were routed, from counts, in nats."""

import numpy as np
from jaxtyping import Float, Int

# Of the values over the tokens, to see what chance alone gives.
NUM_SHUFFLES = 5


def plug_in(
    x_N: Int[np.ndarray, " N"],
    y_N: Int[np.ndarray, " N"],
    weight_N: Float[np.ndarray, " N"] | None = None,
) -> float:
    """Σ p(x, y) ln(p(x, y) / (p(x) p(y))) with p the shares observed; 0 of nothing.

    Too high by about (cells - 1) / 2N where x and y are independent, and without bound on how
    much of it is chance where most values of x are seen once.

    Args:
      x_N, y_N: values of N pairs, from 0 on.
      weight_N: how much each counts; None is 1.
    """
    if not len(x_N):
        return 0.0
    keys, pair_N = np.unique(x_N.astype(np.int64) * (int(y_N.max()) + 1) + y_N, return_inverse=True)
    joint = np.bincount(pair_N, weight_N).astype(np.float64)
    total = joint.sum()
    if not total > 0:
        return 0.0
    x, y = np.divmod(keys, int(y_N.max()) + 1)
    joint /= total
    expected = np.bincount(x, joint)[x] * np.bincount(y, joint)[y]
    seen = joint > 0
    return float(np.sum(joint[seen] * np.log(joint[seen] / expected[seen])))


def corrected(
    x_T: Int[np.ndarray, " T"],
    token_N: Int[np.ndarray, " N"],
    y_N: Int[np.ndarray, " N"],
    weight_N: Float[np.ndarray, " N"] | None = None,
    *,
    num_shuffles: int = NUM_SHUFFLES,
    seed: int = 0,
) -> float:
    """`plug_in` less what it gives when the values are shuffled over the tokens; at least 0.

    The mean over `num_shuffles` permutations drawn from `seed`. What is left is conservative: of
    values seen once nothing counts, since any of them would tell its expert as well.

    Args:
      x_T: a value of every token, from 0 on.
      token_N, y_N: N choices: whose, and of which expert. A token may have several, or none.
      weight_N: how much each choice counts; None is 1.
    """
    if not len(token_N):
        return 0.0
    rng = np.random.default_rng(seed)
    # Tokens without a choice have no part in the counts, and none in the permutations.
    choosing, place_N = np.unique(token_N, return_inverse=True)
    x_T = x_T[choosing]
    found = plug_in(x_T[place_N], y_N, weight_N)
    by_chance = [plug_in(rng.permutation(x_T)[place_N], y_N, weight_N) for _ in range(num_shuffles)]
    return max(found - float(np.mean(by_chance)), 0.0)
