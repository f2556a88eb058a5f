"""Ways of a run beside live calls: waves of files through the Batch API."""
