"""Inputs of a simulation: workloads, traces, scenario files and stress conditions."""
