"""python -m blipds.engine: compiles what DeepSpeed needs on the device at hand, so that later starts are quick."""

from blipds.engine.ops import prepare_ops

prepare_ops(offload=False)
