"""The decision logic of Paceline ("the law") and its live half.

Modules are imported by name (`governor.law`, `governor.policy`, ...): this file stays empty but for the version, so that
importing the pure half never pulls in the edges.
"""

__version__ = "0.1.0"
