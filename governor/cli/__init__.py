"""The commands of the live half, one module per family."""
