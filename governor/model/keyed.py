"""Chance, keyed instead of streamed: the only source of random numbers in Paceline.

Theory of operation. A draw is a pure function of *what it is for*: the seed of the run, the request, its attempt
and the purpose of the draw. Nothing is consumed, so a draw does not depend on how many came before it: live and
simulated runs stay aligned when two events swap places, and two policies compared under one seed see the same
latencies, faults and jitters (common random numbers).

The hash is two lanes of the 32-bit finalizer of MurmurHash3 (Appleby, public domain). Every intermediate is masked to
32 bits and no constant exceeds 2**32, so that Python's unbounded integers and the compiled engine's signed 64-bit
ones agree on every bit. Numbers only: this file is compiled as it stands.
"""

import math

MASK = 0xFFFFFFFF

# Purposes. Part of the record of a run: never renumber one.
JITTER_STAGGER = 1
JITTER_RETRY = 2
LATENCY = 3
STALL = 4
STALL_LENGTH = 5
FAULT = 6
FINALIZE_TEXT = 7
COTENANT = 8
COTENANT_SIZE = 9
OUTPUT_LENGTH = 10
ARRIVAL = 11
RESAMPLE = 12
SEARCH = 13
BATCH_TURNAROUND = 14
BATCH_LINE = 15
TIER = 16


def keyed_uniform(seed: int, request: int, attempt: int, purpose: int) -> float:
    """Return a uniform number in the open interval (0, 1) for this seed, request, attempt and purpose.

    Arguments are whole numbers of at most 63 bits, not negative. Resolution 2**-52; the ends are never reached, so the
    result may go straight into a logarithm or a quantile function.
    """
    tag = attempt * 64 + purpose
    low = (seed & MASK) * 0x9E3779B1 + (request & MASK) * 0x85EBCA77 + (tag & MASK) * 0xC2B2AE3D
    high = (seed >> 32 & MASK) * 0x27D4EB2F + (request >> 32 & MASK) * 0x165667B1 + (request & MASK) * 0x7FEB352D
    # The finalizer twice, written out: a call costs more than the arithmetic. The second lane, which depends on every
    # input, gives the leading bits.
    a = (low + 0x6C62272E) & MASK
    a = ((a ^ (a >> 16)) * 0x85EBCA6B) & MASK
    a = ((a ^ (a >> 13)) * 0xC2B2AE35) & MASK
    a ^= a >> 16
    b = (high + a + tag) & MASK
    b = ((b ^ (b >> 16)) * 0x85EBCA6B) & MASK
    b = ((b ^ (b >> 13)) * 0xC2B2AE35) & MASK
    b ^= b >> 16
    return ((b >> 6) * 67108864.0 + (((a + b) & MASK) >> 6) + 0.5) / 4503599627370496.0


def attempt_key(lane: int, attempt: int) -> int:
    """Return the number under which an attempt draws: a finalize pass (lane 1) shares no number with the main lane."""
    return attempt + 100_000 * lane


def normal_quantile(u: float) -> float:
    """Return the standard normal value below which a share `u` of the mass lies, 0 < u < 1.

    Algorithm AS 241, PPND16 (Wichura 1988), about 1e-16 relative. One uniform makes one normal, monotonically, so that
    common random numbers stay common after the transformation.
    """
    q = u - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        num = (((((((2509.0809287301226727 * r + 33430.575583588128105) * r + 67265.770927008700853) * r
                + 45921.953931549871457) * r + 13731.693765509461125) * r + 1971.5909503065514427) * r
                + 133.14166789178437745) * r + 3.387132872796366608)  # fmt: skip
        den = (((((((5226.495278852854561 * r + 28729.085735721942674) * r + 39307.89580009271061) * r
                + 21213.794301586595867) * r + 5394.1960214247511077) * r + 687.1870074920579083) * r
                + 42.313330701600911252) * r + 1.0)  # fmt: skip
        return q * num / den
    r = math.sqrt(-math.log(u if q < 0.0 else 1.0 - u))
    if r <= 5.0:
        r -= 1.6
        num = (((((((7.7454501427834140764e-4 * r + 0.0227238449892691845833) * r + 0.24178072517745061177) * r
                + 1.27045825245236838258) * r + 3.64784832476320460504) * r + 5.7694972214606914055) * r
                + 4.6303378461565452959) * r + 1.42343711074968357734)  # fmt: skip
        den = (((((((1.05075007164441684324e-9 * r + 5.475938084995344946e-4) * r + 0.0151986665636164571966) * r
                + 0.14810397642748007459) * r + 0.68976733498510000455) * r + 1.6763848301838038494) * r
                + 2.05319162663775882187) * r + 1.0)  # fmt: skip
    else:
        r -= 5.0
        num = (((((((2.01033439929228813265e-7 * r + 2.71155556874348757815e-5) * r + 0.0012426609473880784386) * r
                + 0.026532189526576123093) * r + 0.29656057182850489123) * r + 1.7848265399172913358) * r
                + 5.4637849111641143699) * r + 6.6579046435011037772)  # fmt: skip
        den = (((((((2.04426310338993978564e-15 * r + 1.4215117583164458887e-7) * r + 1.8463183175100546818e-5) * r
                + 7.868691311456132591e-4) * r + 0.0148753612908506148525) * r + 0.13692988092273580531) * r
                + 0.59983220655588793769) * r + 1.0)  # fmt: skip
    x = num / den
    return -x if q < 0.0 else x
