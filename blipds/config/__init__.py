"""The run config and the DeepSpeed JSON: reading, merging, checking."""
