"""The virtual loop of `sim/virtual_loop.py`, by the name under which tests know it."""

from sim.virtual_loop import Deadlock, VirtualLoop, run_virtual

__all__ = ["Deadlock", "VirtualLoop", "run_virtual"]
