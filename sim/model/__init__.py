"""The synthetic provider, sans I/O: limiter, charges, latency and faults; and the requests sent to it."""
