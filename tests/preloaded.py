"""What launching.py's ranks find done when they start: imported by the process that they are forked from."""

import functools
import importlib

import cpuinfo

MODULES = [
    *("blipds.training.building", "blipds.evaluation.evaluator", "blipds.report", "blipds.captioning.stream"),
    *("deepspeed", "transformers.models.blip", "torch.utils.tensorboard", "torch.utils.cpp_extension", "jinja2"),
    "deepspeed.runtime.zero.muon.muon_optimizer",  # each ZeRO optimizer asks whether it is one; loads torch's compiler
]

for name in MODULES:
    importlib.import_module(name)

# DeepSpeed asks twice for each op that it loads, and each answer takes a process of its own.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
cpuinfo.get_cpu_info()
