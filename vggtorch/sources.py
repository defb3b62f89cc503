"""Finds, verifies, reads and writes checkpoints."""
