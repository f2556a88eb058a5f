"""Runs a pool's requests through the provider's Batch API: waves of files, their ledger, their collection."""
