"""Metrics, the process that computes them, and published numbers."""
