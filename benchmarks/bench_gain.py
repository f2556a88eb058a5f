"""What a plan gains on real traces: today's defaults, a fixed recipe and the recommendation, by charge rule.

    python -m benchmarks.bench_gain [--short]

400 rows of vidur-arxiv and of azure conv as a batch at 30,000 TPM, and 20,000 rows of azure conv at 2,000,000 TPM and
10,000 RPM. Each line names the provider's charge rule and the latency model; the traces declare no output cap, so a
flat one of 4,096 is assumed for every row. Figures are means over seeds that the search has never seen.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from governor.model.policy import Policy
from sim.experiment.experiment import Pool, replicate
from sim.experiment.results import Forecast
from sim.model.provider_config import ProviderConfig
from sim.scenario.scenario import FileSource, Scenario
from sim.selection.planner import FRESH_SEEDS, plan
from sim.selection.space import recipe

DATA = Path(os.environ.get("PACELINE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
VIDUR = DATA / "vidur-arxiv" / "arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv"
CONV = DATA / "azure-llm-2023" / "AzureLLMInferenceTrace_conv.csv"


@dataclass(frozen=True)
class Line:
    """One case of the table."""

    title: str
    path: Path
    rows: int
    tpm: int
    rpm: int
    charge_rule: str
    stalls: bool = True


LINES = (
    *(Line("vidur-arxiv", VIDUR, 400, 30_000, 500, rule) for rule in ("prompt_chars4", "max_of", "prompt_plus_max")),
    *(Line("azure conv", CONV, 400, 30_000, 500, rule) for rule in ("prompt_chars4", "max_of", "prompt_plus_max")),
    Line("azure conv, large", CONV, 20_000, 2_000_000, 10_000, "prompt_chars4"),
    Line("azure conv, large", CONV, 20_000, 2_000_000, 10_000, "prompt_chars4", stalls=False),
)
SHORT = (LINES[0], LINES[5])


def scenario_of(line: Line) -> Scenario:
    """The scenario of one line: today's defaults against that provider, whose limits the settings know."""
    latency = {"preset": "gpt-4o"} if line.stalls else {"preset": "gpt-4o", "stall_ratio": 0.0}
    return Scenario.of(
        FileSource(path=str(line.path), first=line.rows),
        provider=ProviderConfig.model_validate(
            {"tpm": line.tpm, "rpm": line.rpm, "charge_rule": line.charge_rule, "latency": latency}
        ),
        policy=Policy(tpm_limit=line.tpm, rpm_limit=line.rpm),
    )


def _cell(found: Forecast) -> str:
    e = found["efficiency"]
    return f"{e.mean:6.3f} [{e.low:.3f}, {e.high:.3f}] {found['throttled_per_100'].mean:5.2f} {found.lost:4d}"


def main() -> None:
    """Prints the table."""
    short = "--short" in sys.argv
    if not VIDUR.exists():
        print(f"bench_gain: skipped, the traces are not at {DATA}")
        return
    print("efficiency [95 % of the mean], throttles per 100, lost in all replications")
    print(f"{'workload':20s} {'charge rule':16s} {'latency':20s} {'today':32s} {'recipe':32s} {'recommended':32s}")
    for line in SHORT if short else LINES:
        scenario, pool = scenario_of(line), Pool()
        found = plan(scenario, effort="quick" if short else "normal", pool=pool)
        n = len(found.full.forecast.runs)
        fixed = replicate(scenario.with_(seed=scenario.seed + FRESH_SEEDS), n, policy=recipe(scenario), pool=pool)
        latency = "gpt-4o" + ("" if line.stalls else ", no stalls")
        cells = " ".join(f"{_cell(f):32s}" for f in (found.now, fixed, found.full.forecast))
        print(f"{line.title:20s} {line.charge_rule:16s} {latency:20s} {cells} n={n}", flush=True)


if __name__ == "__main__":
    main()
