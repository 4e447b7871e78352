"""Splits captioned and scored, and where the decoder looked."""
