"""The decision logic of Paceline ("the law") and its live half.

    from governor import Governor, Policy

    governor = Governor(Policy().with_(tpm_limit=450_000, stagger_s=0))
    async with governor.permit(tokens) as permit:
        ...

Everything else is imported from its module (`governor.law`, `governor.model.requests`, ...). What stands here is
fetched when it is first asked for, so that importing the pure half never pulls in the edges.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from governor.model.errors import PacelineError as PacelineError
    from governor.model.policy import Policy as Policy
    from governor.run.governed import governed as governed
    from governor.run.rows import run_batch as run_batch
    from governor.run.rows import run_batch_sync as run_batch_sync
    from governor.scheduler.driver import Governor as Governor
    from governor.sharedquota.sharing import governor_from_env as governor_from_env

__version__ = "0.1.0"
__all__ = ["Governor", "PacelineError", "Policy", "__version__", "governed", "governor_from_env"]
__all__ += ["run_batch", "run_batch_sync"]

_MODULES = {
    "Governor": "governor.scheduler.driver",
    "PacelineError": "governor.model.errors",
    "Policy": "governor.model.policy",
    "governed": "governor.run.governed",
    "governor_from_env": "governor.sharedquota.sharing",
    "run_batch": "governor.run.rows",
    "run_batch_sync": "governor.run.rows",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
