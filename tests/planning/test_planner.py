"""The forecast against what a CPU's allocator and DeepSpeed's engines really hold, and its arithmetic by hand."""

import json
import math
import runpy
import subprocess
import sys

import pytest
import torch
from held_memory import activations_on_cpu
from launching import REPOSITORY, environment, launch

from blipds.config.deepspeed import load_ds_config, resolve_ds_config
from blipds.config.run import load_run_config
from blipds.config.sections import Config, ModelConfig, RunConfig
from blipds.errors import UserError
from blipds.planning.planner import (
    GB,
    Cluster,
    Forecast,
    ModelStates,
    ParameterSizes,
    Shape,
    activations,
    forecast,
    model_states,
    network,
    recommend,
)

TINY = REPOSITORY / "tests" / "shapes_tiny.yaml"
BOTH = ["model.vit_grad_ckpt=true", "model.text_grad_ckpt=true"]


def config(path=TINY, *options):
    return load_run_config(path, options)[0]


def unresolved(stage, precision="bf16", **zero):
    """A config of ds_configs/ with its precision named, and with changes to its zero_optimization section."""
    ds = load_ds_config(REPOSITORY / "ds_configs" / f"zero{stage}.json")
    for name in ("bf16", "fp16"):
        ds[name]["enabled"] = name == precision
    ds["zero_optimization"] |= zero
    return ds


def test_adapters_have_optimizer_states_and_their_base_has_none():
    sizes = ParameterSizes.of(config(REPOSITORY / "run_configs" / "caption_coco_large_lora.yaml"))
    assert (sizes.trainable, sizes.total - sizes.trainable) == (2_801_664, 446_290_492)
    states = model_states(sizes, ds_config(2, ranks=1), 1)
    assert (states.parameters, states.optimizer) == (2 * sizes.total, 12 * 2_801_664)  # bf16; master and moments


class Model(ModelConfig):
    hidden_size = 128


def ds_config(stage, *, ranks=2, precision="bf16", accumulation=1, micro=16, **zero):
    config = Config(model=Model(), run=RunConfig(batch_size_train=micro, accum_grad_iters=accumulation))
    ds = unresolved(stage, precision, **zero)
    return resolve_ds_config(ds, config, world_size=ranks, default_precision="bf16", source="test")


# ---- Activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "images", "captions", "options"),
    [
        (torch.float32, 4, 5, []),
        (torch.bfloat16, 4, 5, []),
        (torch.float32, 16, 1, ["model.vit_kwargs.drop_path_rate=0.1"]),
        (torch.bfloat16, 4, 5, BOTH),
        (torch.float32, 4, 5, BOTH),
        (torch.bfloat16, 16, 1, ["model.vit_grad_ckpt=true", "model.vit_ckpt_layer=2"]),
        (torch.float32, 16, 1, ["model.freeze_vit=true"]),
    ],
)
def test_activations_are_what_the_allocator_gives_out(dtype, images, captions, options):
    """Quickstart's model at 128 x 128; ds_configs/README.md has BLIP's own sizes."""
    tiny, shape = config(TINY, "model.image_size=128", *options), Shape(images, captions, tokens=20, prompt_tokens=4)
    measured_kept, measured_peak = activations_on_cpu(tiny, shape, dtype)
    kept, peak = activations(tiny, shape, dtype)
    assert kept == pytest.approx(measured_kept, rel=0.02)
    assert peak == pytest.approx(measured_peak, rel=0.05)


def test_no_matrix_of_tokens_by_tokens_is_kept():
    """A ViT/16 has 1 + 12^2, 1 + 24^2 and 1 + 48^2 tokens at these sizes: by their number, not its square."""
    sizes = [config(TINY, f"model.image_size={size}") for size in (192, 384, 768)]
    small, middle, big = (activations(size, Shape(1, 1, 40, 4), torch.bfloat16)[0] for size in sizes)
    assert big - middle == pytest.approx((2305 - 577) / (577 - 145) * (middle - small), rel=0.01)


# ---- Model states ---------------------------------------------------------------------------------------------------

SMALL = {"stage3_param_persistence_threshold": 1000, "stage3_max_live_parameters": 10**6}
SMALL |= {"stage3_max_reuse_distance": 10**5, "stage3_prefetch_bucket_size": 10**5, "reduce_bucket_size": 10**5}
CPU = {"device": "cpu"}
SETTINGS = {
    "zero0 fp32": (0, "fp32", 1, {}, []),
    "zero0 bf16": (0, "bf16", 1, {}, []),
    "zero1 bf16": (1, "bf16", 1, {}, []),
    "zero1 bf16, accumulating": (1, "bf16", 2, {}, []),
    "zero2 fp32": (2, "fp32", 1, {}, []),
    "zero2 bf16": (2, "bf16", 1, {}, []),
    "zero2 bf16, accumulating": (2, "bf16", 2, {}, []),
    "zero2 bf16, accumulating, offloaded": (2, "bf16", 2, {"offload_optimizer": CPU}, []),
    "zero3 bf16, accumulating": (3, "bf16", 2, SMALL, []),
    "zero2 bf16, frozen encoder": (2, "bf16", 1, {}, ["model.freeze_vit=true"]),
    "zero2 bf16, offloaded": (2, "bf16", 1, {"offload_optimizer": CPU}, []),
    "zero3 fp32": (3, "fp32", 1, SMALL, []),
    "zero3 bf16": (3, "bf16", 1, SMALL, []),
    "zero3 bf16, frozen encoder": (3, "bf16", 1, SMALL, ["model.freeze_vit=true"]),
    "zero3 bf16, offloaded": (3, "bf16", 1, {**SMALL, "offload_optimizer": CPU, "offload_param": CPU}, []),
}


def state_options(accumulation, options):
    """8.6 M parameters. The word embeddings are half of them, so that they lie on a border between two ranks."""
    encoder = "model.vit_kwargs={embed_dim: 256, depth: 4, num_heads: 4, patch_size: 16}"
    data = ["datasets.shapes_caption.num_images.train=16", "run.limit_train=8", "run.batch_size_train=2"]
    rest = ["run.num_workers=0", "run.valid_splits=[]", f"run.accum_grad_iters={accumulation}", *options]
    return [encoder, *data, "datasets.shapes_caption.captions_per_image=1", *rest]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Bytes that two ranks hold, by setting."""
    folder = tmp_path_factory.mktemp("states")
    specs = []
    for name, (stage, precision, accumulation, zero, options) in SETTINGS.items():
        options = state_options(accumulation, options)
        ds = unresolved(stage, precision, **zero)
        specs.append({"name": name, "cfg": str(TINY), "options": options, "ds": ds})
    (folder / "spec.json").write_text(json.dumps(specs))
    process = launch(2, "tests/engine/states.py", folder / "spec.json", folder / "bytes.json", timeout=1800)
    assert process.returncode == 0, process.stdout[-4000:]
    return json.loads((folder / "bytes.json").read_text())


@pytest.mark.parametrize("name", SETTINGS)
def test_model_states_are_what_deepspeed_allocates(measured, name):
    """Within 2%. On a CPU everything is host memory, so that what is offloaded counts too."""
    stage, precision, accumulation, zero, options = SETTINGS[name]
    sizes = ParameterSizes.of(config(TINY, *state_options(accumulation, options)))
    ds = ds_config(stage, precision=precision, accumulation=accumulation, micro=2, **zero)
    states = model_states(sizes, ds, ranks=2, accumulation=accumulation)
    device_copy = max(sizes.tensors) * 2 if stage == 2 and "offload_optimizer" in zero else 0
    assert states.held + states.host + device_copy == pytest.approx(measured[name], rel=0.02)


@pytest.mark.parametrize(("stage", "bytes_a_parameter"), [(0, 16), (1, 2 + 14 / 8), (2, 2 + 14 / 8), (3, 16 / 8)])
def test_bytes_a_parameter_of_the_zero_paper(stage, bytes_a_parameter):
    """Figure 1 of arXiv 1910.02054, Adam in half precision on 8 ranks; DeepSpeed's stage 1 splits gradients too
    where nothing is accumulated."""
    sizes = ParameterSizes(((800,) * 8,))
    states = model_states(
        sizes, ds_config(stage, ranks=8, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})), 8
    )
    assert states.held == bytes_a_parameter * 6400


def test_a_parameter_on_the_border_of_two_ranks_has_its_gradient_on_both():
    """Elements 0-9, 10-39, 40-49 on two ranks of 25: the middle one belongs to both."""
    states = model_states(ParameterSizes(((10, 30, 10),)), ds_config(2), ranks=2)
    assert states.gradients == (10 + 30) * 2


# ---- Network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "accumulation", "expected"),
    [(0, 1, 2), (0, 4, 2), (1, 4, 2), (2, 1, 2), (2, 4, 5), (3, 1, 3), (3, 4, 12)],
)
def test_network_volume(stage, accumulation, expected):
    """In parameters, as ds_configs/README.md has it for zero1 and zero2, which send to owners; n x 7/8 on 8 ranks."""
    sent = network(ParameterSizes(((1000,),)), ds_config(stage, ranks=8), ranks=8, accumulation=accumulation)
    assert sent == expected * 1000 * 2 * 7 / 8


def test_recomputing_under_stage_3_gathers_once_more():
    assert network(ParameterSizes(((1000,),)), ds_config(3), 2, 1, recomputes=True) == 4 * 1000 * 2 / 2


# ---- Verdict and recommendation -------------------------------------------------------------------------------------


def test_what_fits_is_a_matter_of_memory():
    tiny, ds = config(), ds_config(2, micro=32)
    needs = forecast(tiny, ds, Cluster(2, 1, 24 * GB))
    assert needs.fits and needs.verdict().startswith("fits")
    less = forecast(tiny, ds, Cluster(2, 1, needs.gpu - 1))
    assert not less.fits and less.verdict().startswith("does not fit")


def test_offloading_needs_host_memory():
    states = ModelStates(0, 0, 0, 0, 0, host=3 * GB)
    for host_memory, fits in ((math.inf, True), (6 * GB, True), (5 * GB, False)):
        cluster = Cluster(gpus_per_node=2, nodes=1, gpu_memory=24 * GB, host_memory=host_memory)
        assert Forecast(cluster, states, network=0, activations=0).fits is fits


def test_the_recommendation_fits_and_keeps_the_global_batch():
    tiny = config(TINY, "run.batch_size_train=24", "run.accum_grad_iters=2")
    candidates = {f"zero{stage}": ds_config(stage, micro=24, accumulation=2) for stage in (0, 2, 3)}
    name, options, needs = recommend(tiny, candidates, Cluster(2, 1, 24 * GB))
    assert name == "zero0" and needs.fits
    assert (options["run.batch_size_train"], options["run.accum_grad_iters"]) == (48, 1)
    assert options["model.vit_grad_ckpt"] is False

    _, tight, fewer = recommend(tiny, candidates, Cluster(2, 1, needs.gpu - 1))
    assert fewer.fits and fewer.gpu < needs.gpu and tight != options
    assert tight["run.batch_size_train"] * tight["run.accum_grad_iters"] == 48
    assert recommend(tiny, candidates, Cluster(2, 1, 1 * GB)) is None


# ---- Command line ---------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(monkeypatch, capsys):
    """launch/plan.py in this process; returns what it prints."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # which main() sets, and monkeypatch removes again
    main = runpy.run_path(str(REPOSITORY / "launch" / "plan.py"))["main"]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["plan.py", "--cfg-path", str(TINY), "--gpus", "2", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return run


def test_plan_prints_a_table_and_a_verdict_without_deepspeed():
    """In a process of its own, which cannot import deepspeed."""
    script = "import runpy, sys; sys.modules['deepspeed'] = None; sys.argv = sys.argv[1:]; "
    script += "runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [sys.executable, "-c", script, "launch/plan.py", "--cfg-path", str(TINY), "--gpus", "2"]
    words += ["--gpu-memory", "8GB", "--ds-config", "ds_configs/zero3.json"]
    done = subprocess.run(words, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "on 1 x 2 GPUs, bf16" in done.stdout
    assert "no checkpointing" in done.stdout
    assert "model.vit_grad_ckpt, model.text_grad_ckpt" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("fits: ")


def test_plan_writes_its_recommendation(plan, tmp_path):
    arguments = ("--gpu-memory", "8GiB", "--recommend", tmp_path / "ds.json", "--options", "run.batch_size_train=8")
    printed = plan(*arguments)
    load_ds_config(tmp_path / "ds.json")
    assert f"--ds-config {tmp_path / 'ds.json'}" in printed
    assert "--options run.batch_size_train=8 run.batch_size_train=8 run.accum_grad_iters=1" in printed
    assert "model.vit_grad_ckpt=false model.vit_ckpt_layer=null model.text_grad_ckpt=false" in printed
    with pytest.raises(UserError, match="exists already"):
        plan(*arguments)


def test_plan_names_a_size_without_a_unit(plan, capsys):
    with pytest.raises(SystemExit):
        plan("--gpu-memory", "24")
    assert "'24' is not a size; expected a number and GB or GiB" in capsys.readouterr().err
