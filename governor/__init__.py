"""The decision logic of Paceline ("the law") and its live half.

Modules are imported by name (`governor.law`, `governor.policy`, ...). This file holds the version and nothing else, so
that importing the pure half never pulls in the edges.
"""

__version__ = "0.1.0"
