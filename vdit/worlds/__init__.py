"""Simulated worlds with captions and truth: sources of clips, and oracles that score samples."""
