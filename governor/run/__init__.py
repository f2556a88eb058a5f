"""Run a batch from its file to its results (intake, pools, outputs, steering, status), and govern clients."""
