"""A batch from its file to its results (intake, pools, outputs, steering, status), and clients that are governed."""
