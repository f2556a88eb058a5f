"""The requests of a workload as jobs of a simulated run, read from the columns in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from governor import law
from governor.model.needs import TOKENS, Scheduled, Weights
from governor.model.requests import CAUSES
from sim.des.run import arrival_order, batch_order, rows_of
from sim.model.draws import first_jitters, first_latencies_s
from sim.model.provider import ProviderParams
from sim.model.workload import Columns

_CHUNK = 4096


class Job(Scheduled):
    """One request in progress: what the provider must know of it, and the provider's answer.

    `drawn_s`: its latency, drawn ahead for the first attempt, -1 = not drawn yet. `stated`: what the answer's headers
    will state: dimension, limit and remaining amount. `weights`: what its tokens take of the dimensions.
    """

    __slots__ = (
        *("charge", "output", "recorded_s", "drawn_s", "arrived_s"),
        *("outcome", "charged", "retry_after_s", "stated", "waits_s"),
    )
    # Set at launch: slots without a value until then.
    outcome: int
    charged: float
    retry_after_s: float
    stated: Sequence[tuple[int, float, float]]
    waits_s: list[float]

    def __init__(
        self,
        index: int,
        reserve: float,
        expected: float,
        charge: float,
        prompt: float,
        output: float,
        recorded_s: float,
        submitted_s: float,
        drawn_s: float = -1.0,
        jitter_u: float = -1.0,
        weights: Weights = TOKENS,
    ) -> None:
        # (Quicker than super() by a third.)
        Scheduled.__init__(self, index, reserve, expected, submitted_s, jitter_u, prompt, weights)
        self.charge = charge
        self.output = output
        self.recorded_s = recorded_s
        self.drawn_s = drawn_s
        self.arrived_s = submitted_s


def jobs_of(
    columns: Columns,
    params: law.Params,
    provider: ProviderParams,
    seed: int,
    provider_seed: int,
    *,
    from_trace: bool,
) -> Iterator[Job]:
    """Yield new jobs in order of launch (a batch) or of arrival (a trace). Seeds: the law's and the provider's."""
    c = columns
    order = arrival_order(c) if from_trace else batch_order(c, params)
    zeros = [0.0] * len(CAUSES)
    weights = Weights(tuple(provider.per_request), tuple(provider.per_input), tuple(provider.per_output))
    for start in range(0, len(c), _CHUNK):
        i = rows_of(order, start, min(start + _CHUNK, len(c)))
        output = np.where(c.cap[i] > 0, np.minimum(c.output_tokens[i], c.cap[i]), c.output_tokens[i])
        arrival = c.arrival_s[i] if from_trace else np.zeros(len(i))
        output = output.astype(np.float64)
        prompt, expected = c.prompt_tokens[i].astype(np.float64), c.cap[i].astype(np.float64)
        read = (i, c.reserve[i], expected, c.charge[i], prompt, output, c.recorded_s[i], arrival)
        drawn_s = first_latencies_s(provider, provider_seed, i, output, c.recorded_s[i])
        jitters = first_jitters(params, seed, i)
        for row in zip(*(column.tolist() for column in read), drawn_s, jitters, [weights] * len(i), strict=True):
            job = Job(*row)
            job.since = zeros
            yield job
