"""Many runs of a scenario: replications under common random numbers, intervals, local cores or Ray."""
