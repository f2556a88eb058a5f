"""Ways of a run's requests beside one pool's live calls: the Batch API, and pools that share a model."""
