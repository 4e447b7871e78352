"""From annotation files to batches. Builders are registered by the imports below."""

from blipds.data import datasets, processors  # noqa: F401
