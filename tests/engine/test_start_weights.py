"""No weight is rounded on its way in: what bf16 and fp16 runs hold and save is what they started from, bit by bit."""

import json
import os

import pytest
import torch
from launching import launch
from safetensors.torch import load_file, save_file

from blipds.config.run import load_run_config
from blipds.engine.ops import ASYNC_IO, load_op
from blipds.models import build_model
from blipds.models.initialisation import initialise
from blipds.models.parameters import copy_into

BF16, FP16, FP32 = (
    {"bf16": {"enabled": on == "bf16"}, "fp16": {"enabled": on == "fp16"}} for on in ("bf16", "fp16", "")
)
CPU = {"offload_optimizer": {"device": "cpu"}}
TORCH_ADAM = {"optimizer": {"params": {"torch_adam": True}}}
FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
STAGES = {f"zero{stage}": {"zero_optimization": {"stage": stage}} for stage in range(4)}
PARAMETERS_TOO = CPU | {"offload_param": {"device": "cpu"}, "sub_group_size": 100_000}
LEARNT = {
    **{f"bf16 {name}": BF16 | ds for name, ds in STAGES.items()},
    "bf16 zero0 torch": BF16 | TORCH_ADAM | STAGES["zero0"],
    "bf16 zero1 fp32 gradients": BF16 | FP32_GRADIENTS | STAGES["zero1"],
    "bf16 zero1 offload": BF16 | {"zero_optimization": {"stage": 1} | CPU},
    "bf16 zero2 offload": BF16 | {"zero_optimization": {"stage": 2} | CPU},
    "bf16 zero3 offload": BF16 | {"zero_optimization": {"stage": 3} | PARAMETERS_TOO},
    "bf16 zero3 node": BF16 | {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
    "fp32 zero2": FP32 | STAGES["zero2"],
}
NVME = "bf16 zero3 nvme"
STANDING = {f"fp16 {name}": FP16 | ds for name, ds in STAGES.items()}
RATES = 10 * [0.0] + 10 * [1e-3]
AT_LENGTH = ("bf16 zero2", "bf16 zero3")  # the others take four of these steps
FROM_RUN = {"finetuned": ("bf16 zero2", "bf16 zero3"), "resumed": ("bf16 zero1", "bf16 zero3 offload", "bf16 zero0")}
RANDOM = ("bf16 zero0", "bf16 zero3")


def config_file(folder, shared, load):
    path = folder / f"{'checkpoint' if load else 'random'}.yaml"
    path.write_text(
        f"""
model:
  load_finetuned: {str(load).lower()}
  load_pretrained: false
  finetuned: {shared}/oracle/tiny_blip.pth
  freeze_vit: {str(load).lower()}
  image_size: 96
  med_config_path: {shared}/oracle/med_config.json
  vit_kwargs: {{embed_dim: 96, depth: 4, num_heads: 4, patch_size: 16{"" if load else ", init_values: 1.0e-5"}}}
datasets:
  shapes_caption:
    num_images: {{train: 16}}
run:
  batch_size_train: 4
  weight_decay: 0
  num_workers: 0
  valid_splits: []
"""
    )
    return path


@pytest.fixture(scope="module")
def starts(shared, tmp_path_factory):
    """The two starts, in fp32: the oracle's checkpoint, and random weights."""
    folder = tmp_path_factory.mktemp("starts")
    stored = torch.load(shared / "oracle" / "tiny_blip.pth", map_location="cpu", weights_only=True)["model"]
    save_file({name: tensor.clone() for name, tensor in stored.items()}, folder / "checkpoint.safetensors")
    config, _ = load_run_config(config_file(folder, shared, load=False), [])
    model = build_model(config.model, checkpoint_fn=lambda function, *inputs: function(*inputs))
    initialise(model, config.run.seed, lambda name, tensor: copy_into(model, name, tensor))
    save_file(dict(model.named_parameters()), folder / "random.safetensors")
    config_file(folder, shared, load=True)
    return folder


def launched(folder, specs):
    (folder / "specs.json").write_text(json.dumps(specs))
    script = "tests/engine/start_weights.py"
    process = launch(2, script, folder / "specs.json", folder / "results.json", timeout=1800)
    assert process.returncode == 0, process.stdout[-6000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def results(starts, tmp_path_factory):
    """What two ranks held, in one launch: from the checkpoint, random weights, checkpoints of the first settings."""
    folder = tmp_path_factory.mktemp("runs")

    def spec(name, ds, rates, start=starts / "checkpoint.safetensors", **rest):
        cfg = str(starts / f"{start.stem if start.parent == starts else 'checkpoint'}.yaml")
        quiet = ds | {"steps_per_print": 10**9}
        return {"name": name, "ds": quiet, "cfg": cfg, "options": [], "rates": rates, "start": str(start), **rest}

    learnt = dict(LEARNT)
    if not any(load_op(builder, print) for builder in ASYNC_IO):
        disk = {"device": "nvme", "nvme_path": str(tmp_path_factory.mktemp("nvme"))}
        zero = {"stage": 3, "offload_optimizer": disk, "offload_param": disk | {"buffer_size": 10**6}}
        learnt[NVME] = BF16 | {"zero_optimization": zero}
    elif os.environ.get("CI") == "true":
        pytest.fail("DeepSpeed's async_io does not compile: it needs libaio-dev")
    specs = [spec(name, ds, RATES if name in AT_LENGTH else RATES[8:12]) for name, ds in learnt.items()]
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        specs += [spec(name, ds, [0.0, 0.0]) for name, ds in STANDING.items()]
    specs += [spec(f"random {name}", LEARNT[name], [], starts / "random.safetensors") for name in RANDOM]
    for how, names in FROM_RUN.items():
        for name in names:
            run_dir = folder / name
            start = run_dir / "checkpoints" / "latest" / "model.safetensors"
            rest = {"resume": str(run_dir)} if how == "resumed" else {"options": [f"model.finetuned={run_dir}"]}
            specs.append(spec(f"{how} {name}", LEARNT[name], [], start, **rest))
    return launched(folder, specs)


def test_every_setting_starts_with_the_numbers_of_its_source(results):
    """Checkpoint, random numbers, another run, its own run before: masters and frozen tensors, all of them.

    So it is after steps at a learning rate of 0.
    """
    assert len(results) >= len(LEARNT) + len(RANDOM) + 5
    for name, result in results.items():
        assert all(names == [] for names in result["unequal"].values()), name
    assert {name: len(result["unequal"]) for name, result in results.items() if name in LEARNT} == {
        name: 11 if name in AT_LENGTH else 3 for name in LEARNT
    }


@pytest.mark.parametrize("name", [*LEARNT, NVME])
def test_after_training(results, name):
    """Frozen tensors are the checkpoint's; learnt ones those of an fp32 copy that torch's AdamW moves alike.

    A start rounded to bf16 would be 0.0039 off; fp32 numbers around 1 lie 1.2e-7 apart.
    """
    if name not in results:
        pytest.skip("DeepSpeed's async_io does not compile: it needs libaio-dev, which tests/run.sh could not install")
    assert results[name]["frozen"] == []
    assert results[name]["moved"] > (8e-3 if name in AT_LENGTH else 1.9e-3)
    assert results[name]["off the copy"] < 3e-7


def test_rank_0_alone_keeps_what_rounding_changed(results, starts):
    """4 bytes a frozen weight, and nothing where the model's precision is fp32."""
    tensors = load_file(starts / "checkpoint.safetensors")
    rounded = (
        t for name, t in tensors.items() if name.startswith("visual_") and not torch.equal(t.bfloat16().float(), t)
    )
    assert results["bf16 zero3"]["kept for frozen"] == [sum(tensor.numel() for tensor in rounded), 0]
    assert results["fp32 zero2"]["kept for frozen"] == [0, 0]
