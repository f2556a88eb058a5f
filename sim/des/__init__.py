"""The discrete-event simulation: the SimPy driver and its compiled twin, equal to the bit."""
