"""A training run: building it, the loop, validation, where it stands."""
