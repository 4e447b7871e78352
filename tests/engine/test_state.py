"""A run goes on from a checkpoint on other ranks and under another ZeRO stage as if nothing had happened."""

import json

import pytest
from launching import launch

STEPS, FIRST, SECOND = 6, 2, 4
FP32 = {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
BF16 = {"bf16": {"enabled": True}, "fp16": {"enabled": False}}
CPU = {"offload_optimizer": {"device": "cpu"}}
TORCH_ADAM = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
# name -> DeepSpeed config; dropout is on wherever the number of ranks stays
KINDS = {
    "zero0": FP32 | {"zero_optimization": {"stage": 0}},
    "zero1": FP32 | {"zero_optimization": {"stage": 1}},
    "zero2": FP32 | {"zero_optimization": {"stage": 2}},
    "zero3": FP32 | {"zero_optimization": {"stage": 3}},
    "offload3": FP32 | {"zero_optimization": {"stage": 3} | CPU},
    "torch0": FP32 | {"zero_optimization": {"stage": 0}} | TORCH_ADAM,
    "bf16 zero0": BF16 | {"zero_optimization": {"stage": 0}},
    "bf16 zero1": BF16 | {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
    "bf16 torch0": BF16 | {"zero_optimization": {"stage": 0}} | TORCH_ADAM,
}
DROPOUT = "model.med_config_path=configs/models/med_config_tiny.json"
NO_DROPOUT = "model.med_config_path=tests/engine/no_dropout.json"


def spec(name, ds, *options, **rest):
    options = [
        *("datasets.shapes_caption.num_images.train=24", "datasets.shapes_caption.captions_per_image=all"),
        *("run.valid_splits=[]", "run.test_splits=[]", "run.warmup_steps=2", "run.num_workers=0"),
        *("run.runner=runner_iter", f"run.max_iters={STEPS}", "run.log_freq=1", "run.max_grad_norm=1.0"),
        *options,
    ]
    ds = {**ds, "steps_per_print": 10**9}
    return {"name": name, "cfg": "run_configs/shapes_tiny.yaml", "ds": ds, "options": options, **rest}


def train(folder, ranks, specs):
    """{name: losses} of one launch"""
    file, results = folder / "specs.json", folder / "losses.json"
    file.write_text(json.dumps(specs))
    process = launch(ranks, "tests/engine/grid.py", file, results)
    assert process.returncode == 0, process.stdout[-6000:]
    return {name: result["losses"] for name, result in json.loads(results.read_text()).items()}


@pytest.fixture(scope="module")
def legs(tmp_path_factory):
    """Losses of three launches: whole runs and first legs on two ranks, second legs on one, all the rest on two."""
    folder = tmp_path_factory.mktemp("legs")
    two, one = (["run.batch_size_train=4"], ["run.batch_size_train=8"])

    def run(name):
        return {"run_dir": str(folder / name)}

    def on(name):
        return run(name) | {"resume": str(folder / name)}

    chain = {"3, 1, 2": ("zero3", "zero1", "zero2"), "0, offload, 3": ("zero0", "offload3", "zero3")}
    first = [spec(f"whole {name}", ds, *two, DROPOUT) for name, ds in KINDS.items()]
    first += [spec(name, ds, *two, DROPOUT, until=FIRST, **run(name)) for name, ds in KINDS.items()]
    first += [spec("undisturbed", KINDS["zero2"], *two, NO_DROPOUT)]
    first += [spec(name, KINDS[kinds[0]], *two, NO_DROPOUT, until=FIRST, **run(name)) for name, kinds in chain.items()]
    second = [spec(name, KINDS[kinds[1]], *one, NO_DROPOUT, until=SECOND, **on(name)) for name, kinds in chain.items()]
    third = [spec(name, KINDS[kinds[2]], *two, NO_DROPOUT, **on(name)) for name, kinds in chain.items()]
    third += [spec(name, ds, *two, DROPOUT, **on(name)) for name, ds in KINDS.items()]
    launches = [train(folder, 2, first), train(folder, 1, second), train(folder, 2, third)]
    losses = {name: [loss for launched in launches for loss in launched.get(name, [])] for name in (*KINDS, *chain)}
    return launches[0], losses, chain


def test_the_same_arrangement_goes_on_to_the_bit(legs):
    """Killed runs in fp32, and bf16 too: each launch is a process of its own."""
    whole, losses, _ = legs
    for name in KINDS:
        assert len(losses[name]) == STEPS
        assert losses[name] == whole[f"whole {name}"], name


def test_another_arrangement_goes_on_within_rounding(legs):
    """2 ranks -> 1 rank -> 2 ranks under three stages, against one run under ZeRO-2 on 2 ranks."""
    whole, losses, chain = legs
    for name in chain:
        assert losses[name] == pytest.approx(whole["undisturbed"], rel=1e-4), name
