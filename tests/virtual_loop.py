"""The virtual loop of `sim/des/virtual_loop.py`, by the name under which tests know it."""

from sim.des.virtual_loop import Deadlock, VirtualLoop, run_virtual

__all__ = ["Deadlock", "VirtualLoop", "run_virtual"]
