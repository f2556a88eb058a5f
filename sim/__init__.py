"""A synthetic provider, and drivers that run the law of `governor` in simulated time.

    from sim import Scenario, plan, simulate

    today = Scenario("requests.jsonl", tpm=30_000, rpm=500)
    result = simulate(today.with_(stagger_s=5), replications=20)
    result.estimates  # pandas: every figure with its interval
    found = plan(today)
    print(found.env)  # the recommended settings

Needs the extra `sim` (`pip install 'paceline[sim]'`). Everything else is imported from its module; the `paceline`
command is `sim.app.cli`. What stands here is fetched when it is first asked for, so that the command starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sim.app.api import Comparison as Comparison
    from sim.app.api import PlanResult as PlanResult
    from sim.app.api import SimulationResult as SimulationResult
    from sim.app.api import compare as compare
    from sim.app.api import knob_map as knob_map
    from sim.app.api import plan as plan
    from sim.app.api import simulate as simulate
    from sim.app.api import simulate_pools as simulate_pools
    from sim.app.api import simulate_processes as simulate_processes
    from sim.scenario.scenario import Scenario as Scenario

__all__ = [
    "Comparison",
    "PlanResult",
    "Scenario",
    "SimulationResult",
    "compare",
    "knob_map",
    "plan",
    "simulate",
    "simulate_pools",
    "simulate_processes",
]

# `given` brings along the reader of requests.
_MODULES = {"Scenario": "sim.app.given", **dict.fromkeys(set(__all__) - {"Scenario"}, "sim.app.api")}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "sim").split(".")[0] in ("governor", "sim"):
            raise
        raise ImportError(f"{name} needs {error.name}, which comes with: pip install 'paceline[sim]'") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
