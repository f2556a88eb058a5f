"""A synthetic provider, and drivers that run the law of `governor` in simulated time.

Needs the extra `sim` (`pip install 'paceline[sim]'`). Modules are imported by name;
the `paceline` command is `sim.cli`.
"""
