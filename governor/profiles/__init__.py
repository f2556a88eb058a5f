"""Profiles: one declarative file per provider: its limits, headers, charge rule, error codes, tiers, prices, latency.

The live half and the synthetic provider read the same file. To support another provider, write a file; no code.
"""
