"""Fused operations of the hot paths; each op is a folder with reference, kernel and bench."""
