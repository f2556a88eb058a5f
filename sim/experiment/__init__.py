"""Many runs of a scenario: replications under common random numbers, intervals, and local or Ray workers."""
