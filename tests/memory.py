"""What a process has held at its peak."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_mib() -> float:
    """The most memory this process has held. Not ru_maxrss, which on Linux starts at what the parent held."""
    status = Path("/proc/self/status")
    if status.exists():
        (kib,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(kib) / 1024
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
