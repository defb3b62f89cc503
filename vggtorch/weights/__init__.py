"""Checkpoints: where they are published, fetched, verified, read in every form, converted."""
