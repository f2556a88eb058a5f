"""Plan a batch of LLM calls before it costs anything, then run it with the settings that were simulated.

    from paceline import Policy, Scenario, governed, plan, simulate

Each name is imported on first use: `simulate`, `plan`, `compare` and `Scenario` need the extra `paceline[sim]`, and the
rest works without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import governor
from governor import __version__ as __version__

if TYPE_CHECKING:
    from governor import Governor as Governor
    from governor import PacelineError as PacelineError
    from governor import Policy as Policy
    from governor import governed as governed
    from governor import governor_from_env as governor_from_env
    from governor import run_batch as run_batch
    from governor import run_batch_sync as run_batch_sync
    from sim import Scenario as Scenario
    from sim import compare as compare
    from sim import plan as plan
    from sim import simulate as simulate

_SIM = ("Scenario", "compare", "plan", "simulate")
__all__ = ["Governor", "PacelineError", "Policy", "Scenario", "__version__", "compare"]
__all__ += ["governed", "governor_from_env", "plan", "run_batch", "run_batch_sync", "simulate"]


def __getattr__(name: str) -> Any:
    if name in _SIM:
        import sim  # imported here because it needs the extra `paceline[sim]`

        return getattr(sim, name)
    if name in __all__:
        return getattr(governor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
