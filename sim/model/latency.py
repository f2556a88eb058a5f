"""How long the synthetic provider takes over an answer, as plain functions over numbers.

Compiled as it stands, like `provider`, whose `ProviderParams` is `pp` here.
"""

import math
from typing import Any

from governor.model.keyed import LATENCY, STALL, STALL_LENGTH, keyed_uniform, normal_quantile

# A measured shape of noise: groups of answer lengths, and normal scores from -4 to 4, a quarter apart.
NOISE_GROUPS = 4
NOISE_KNOTS = 33
NOISE_REACH = 4.0


def smooth_latency_s(pp: Any, output_tokens: float, recorded_s: float, u: float) -> float:
    """Return seconds from admission to the whole answer, without stalls; `u` is the uniform number behind its noise.

    A recorded time (>= 0, from a trace) replaces the model.
    """
    if recorded_s >= 0.0:
        return recorded_s
    service_s = pp.first_token_s + pp.per_token_s * output_tokens
    if pp.sigma > 0.0:
        service_s *= math.exp(_log_noise(pp, output_tokens, normal_quantile(u)))
    return service_s


def _log_noise(pp: Any, output_tokens: float, score: float) -> float:
    """Return the logarithm of an answer's latency noise at a normal score: sigma times it, or the measured shape."""
    if pp.noise_from[0] == math.inf:
        return pp.sigma * score
    group = 0
    while group < NOISE_GROUPS - 1 and pp.noise_from[group + 1] <= output_tokens:
        group += 1
    place = min(max(score / NOISE_REACH + 1.0, 0.0), 2.0) * (NOISE_KNOTS - 1) / 2.0
    knot = min(int(place), NOISE_KNOTS - 2)
    low = pp.noise[group * NOISE_KNOTS + knot]
    return low + (pp.noise[group * NOISE_KNOTS + knot + 1] - low) * (place - knot)


def stall_s(pp: Any, seed: int, request: int, attempt: int) -> float:
    """Return the length of a stalling answer's stall, in seconds."""
    u = keyed_uniform(seed, request, attempt, STALL_LENGTH)
    return pp.stall_min_s + (pp.stall_max_s - pp.stall_min_s) * u


def latency_s(pp: Any, seed: int, request: int, attempt: int, output_tokens: float, recorded_s: float) -> float:
    """Return seconds from admission to the whole answer."""
    u = 0.5
    if pp.sigma > 0.0 and recorded_s < 0.0:
        u = keyed_uniform(seed, request, attempt, LATENCY)
    service_s = smooth_latency_s(pp, output_tokens, recorded_s, u)
    if pp.stall_ratio > 0.0 and keyed_uniform(seed, request, attempt, STALL) < pp.stall_ratio:
        service_s += stall_s(pp, seed, request, attempt)
    return service_s
