"""BLIP's captioner (arXiv 2201.12086)."""
