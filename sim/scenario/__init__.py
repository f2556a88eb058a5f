"""What is simulated: workloads, traces, scenario files, stress conditions."""
