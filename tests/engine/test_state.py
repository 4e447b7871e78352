"""A run goes on from a checkpoint on other ranks and under another ZeRO stage as if nothing had happened."""

import json
import re
import shutil

import pytest
import torch
from deepspeed import __version__
from launching import REPOSITORY, launch
from torch import nn

from blipds.engine.state import FIELDS, READ_VERSION, check_fields
from blipds.errors import UserError

STEPS, FIRST, SECOND = 6, 2, 4
FP32 = {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
BF16 = {"bf16": {"enabled": True}, "fp16": {"enabled": False}}
CPU = {"offload_optimizer": {"device": "cpu"}}
DROPOUT = "model.med_config_path=tests/engine/dropout.json"
NO_DROPOUT = "model.med_config_path=tests/engine/no_dropout.json"
# name -> DeepSpeed config, and whether there is dropout, which another number of ranks would draw otherwise
KINDS = {
    "zero0": (FP32 | {"zero_optimization": {"stage": 0}}, DROPOUT),
    "zero1": (FP32 | {"zero_optimization": {"stage": 1}}, NO_DROPOUT),
    "zero2": (FP32 | {"zero_optimization": {"stage": 2}}, NO_DROPOUT),
    "zero3": (FP32 | {"zero_optimization": {"stage": 3}}, NO_DROPOUT),
    "offload3": (FP32 | {"zero_optimization": {"stage": 3} | CPU}, NO_DROPOUT),
    "bf16 zero0": (BF16 | {"zero_optimization": {"stage": 0}}, DROPOUT),
    "bf16 zero1": (BF16 | {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}, DROPOUT),
}
WHOLE = [name for name in KINDS if name != "zero1"]
CHAINS = {"zero3": ("zero1", "zero2"), "offload3": ("zero0", "zero3")}  # where it starts: the kinds that go on


def spec(name, kind, micro_batch, run_dir, dropout=None, **rest):
    ds, own_dropout = KINDS[kind]
    options = [
        *("datasets.shapes_caption.num_images.train=24", "datasets.shapes_caption.captions_per_image=all"),
        *("run.valid_splits=[]", "run.test_splits=[]", "run.warmup_steps=2", "run.num_workers=0"),
        *("run.runner=runner_iter", f"run.max_iters={STEPS}", "run.log_freq=1", "run.max_grad_norm=1.0"),
        *(f"run.batch_size_train={micro_batch}", "run.save_steps=2", "run.keep_last=9", dropout or own_dropout),
    ]
    ds = {**ds, "steps_per_print": 10**9}
    where = {"cfg": "tests/shapes_tiny.yaml", "run_dir": str(run_dir)}
    return {"name": name, "ds": ds, "options": options, **where, **rest}


def train(folder, ranks, specs):
    """{name: losses} of one launch"""
    file, results = folder / "specs.json", folder / "losses.json"
    file.write_text(json.dumps(specs))
    process = launch(ranks, "tests/engine/grid.py", file, results, timeout=1800)
    assert process.returncode == 0, process.stdout[-6000:]
    return {name: result["losses"] for name, result in json.loads(results.read_text()).items()}


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """Losses of three launches: whole runs on two ranks, second legs of the chains on one, all that goes on on two."""
    folder = tmp_path_factory.mktemp("runs")
    early = {name: str(folder / name / "checkpoints" / f"step_{FIRST:08d}") for name in WHOLE}
    whole = train(folder, 2, [spec(name, name, 4, folder / name) for name in WHOLE])
    chained = {name: folder / f"from {name}" for name in CHAINS}
    for name, run_dir in chained.items():
        (run_dir / "checkpoints").mkdir(parents=True)
        shutil.copytree(early[name], run_dir / "checkpoints" / f"step_{FIRST:08d}")
    second = [
        spec(name, kinds[0], 8, chained[name], NO_DROPOUT, resume=str(chained[name]), until=SECOND)
        for name, kinds in CHAINS.items()
    ]
    second = train(folder, 1, second)
    # first what is compared to the bit, in the order of the first launch: what DeepSpeed replaces in torch for stage 3
    # stays for the rest of the process, and rounds otherwise
    third = [spec(name, name, 4, folder / name, resume=early[name]) for name in WHOLE]
    third += [
        spec(f"from {name}", kinds[1], 4, chained[name], NO_DROPOUT, resume=str(chained[name]))
        for name, kinds in CHAINS.items()
    ]
    return whole, second, train(folder, 2, third)


def test_the_same_arrangement_goes_on_to_the_bit(launches):
    whole, _, third = launches
    for name in WHOLE:
        assert len(whole[name]) == STEPS
        assert third[name] == whole[name][FIRST:], name


def test_another_arrangement_goes_on_within_rounding(launches):
    """2 ranks -> 1 rank -> 2 ranks, under another stage each time, against ZeRO-2 on 2 ranks in one go."""
    whole, second, third = launches
    for name in CHAINS:
        losses = whole[name][:FIRST] + second[name] + third[f"from {name}"]
        assert losses == pytest.approx(whole["zero2"], rel=1e-4), name


# --- DeepSpeed's private fields


def stub(kind, fields):
    return type(kind, (), dict.fromkeys(fields))()


def test_the_pinned_version_is_the_one_whose_fields_are_read():
    (pin,) = re.findall("deepspeed>=(.*),<0.20", (REPOSITORY / "setup.cfg").read_text())
    assert pin == READ_VERSION


def test_a_missing_field_names_both_versions():
    adam, parameter = torch.optim.AdamW([nn.Parameter(torch.zeros(1))]), nn.Parameter(torch.zeros(1))
    parameter._hp_mapping = None
    kind = "DeepSpeedZeroOptimizer"
    check_fields(stub(kind, FIELDS[kind]), adam, [parameter])
    with pytest.raises(UserError) as caught:
        check_fields(stub(kind, FIELDS[kind][1:]), adam, [parameter, nn.Parameter(torch.zeros(1))])
    assert str(caught.value) == (
        f"deepspeed {__version__} is installed, and blipds knows the optimizers of {READ_VERSION} "
        f"(DeepSpeedZeroOptimizer has no bit16_groups; a parameter has no _hp_mapping): "
        f"pip install deepspeed=={READ_VERSION}"
    )
    with pytest.raises(UserError, match="SuperOffloadOptimizer_Stage3 is unknown"):
        check_fields(stub("SuperOffloadOptimizer_Stage3", ()), adam, [])
