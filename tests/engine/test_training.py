"""The loop under DeepSpeed computes what the original code computes, whatever the stage and the number of ranks."""

import json

import pytest
from launching import launch

STAGES = (0, 1, 2, 3)


def ds(stage, accumulation="auto"):
    fp32 = {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
    return {"zero_optimization": {"stage": stage}, "steps_per_print": 10**9, **fp32}


def iterations(steps):
    return ["run.runner=runner_iter", f"run.max_iters={steps}", "run.log_freq=1", "run.save_last=false"]


def train(folder, ranks, specs):
    """{setting: {losses, grad_norms, weight_sums}} of one launch"""
    spec, losses = folder / f"spec{ranks}.json", folder / f"losses{ranks}.json"
    spec.write_text(json.dumps(specs))
    process = launch(ranks, "tests/engine/grid.py", spec, losses)
    assert process.returncode == 0, process.stdout[-4000:]
    return json.loads(losses.read_text())


@pytest.fixture(scope="module")
def oracle(shared):
    return json.loads((shared / "oracle" / "golden.json").read_text())["train"]


@pytest.fixture(scope="module")
def oracle_config(shared, oracle, tmp_path_factory):
    """A run config that trains the oracle's pairs in the oracle's order, without augmentation."""
    folder = tmp_path_factory.mktemp("oracle")
    prompt = "a picture of "
    pairs = [
        {"image": image, "caption": caption.removeprefix(prompt), "image_id": number}
        for number, (image, caption) in enumerate(oracle["pairs"])
    ]
    (folder / "train.json").write_text(json.dumps(pairs))
    path = folder / "run.yaml"
    path.write_text(
        f"""
model:
  load_pretrained: false
  finetuned: {shared}/oracle/tiny_blip.pth
  vit_kwargs: {{embed_dim: 96, depth: 4, num_heads: 4}}
  image_size: 96
  med_config_path: {shared}/oracle/med_config.json
datasets:
  custom_caption:
    build_info: {{annotations: {{train: {{storage: {folder}/train.json}}}}}}
    images: {shared}/data/flickr8k/images
    vis_processor: {{train: {{name: blip_image_eval}}}}
    text_processor: {{train: {{max_words: 100}}}}
run:
  lr_sched: constant_lr
  init_lr: {oracle["lr"]}
  weight_decay: {oracle["weight_decay"]}
  shuffle: false
  num_workers: 0
  valid_splits: []
"""
    )
    return path


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_eight_losses_of_the_original_code(ranks, oracle, oracle_config, tmp_path):
    specs = [
        {
            "name": f"{decay} {stage}",
            "cfg": str(oracle_config),
            "ds": ds(stage),
            "options": [f"run.weight_decay_on={decay}", f"run.batch_size_train={8 // ranks}", *iterations(8)],
        }
        for stage in STAGES
        for decay in ("all", "matrices")
    ]
    results = train(tmp_path, ranks, specs)
    for stage in STAGES:
        assert results[f"all {stage}"]["losses"] == pytest.approx(oracle["loss_decay_all"], rel=1e-5)
        assert results[f"matrices {stage}"]["losses"] == pytest.approx(oracle["loss_decay_matrices_only"], rel=1e-5)


SHAPES = "tests/shapes_tiny.yaml"
NO_DROPOUT = "model.med_config_path=tests/engine/no_dropout.json"


def shapes_spec(name, stage, micro, accumulation, steps, *options):
    sizes = [f"run.batch_size_train={micro}", f"run.accum_grad_iters={accumulation}", "run.num_workers=0"]
    few = [
        "datasets.shapes_caption.num_images.train=70",
        "datasets.shapes_caption.captions_per_image=all",
        "run.valid_splits=[]",
        "run.warmup_steps=0",
        NO_DROPOUT,
    ]
    options = [*few, *sizes, *iterations(steps), "run.save_freq=1000", *options]
    return {"name": name, "cfg": SHAPES, "ds": ds(stage), "options": options}


LEARN = ("run.max_grad_norm=0.5", "run.lr_sched=constant_lr")
RECOMPUTED = ("model.vit_grad_ckpt=true", "model.text_grad_ckpt=true")


@pytest.fixture(scope="module")
def embeds_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("embeds")


@pytest.fixture(scope="module")
def two_ranks(embeds_folder, tmp_path_factory):
    """All that two ranks train for the tests below, in one launch: a launch costs more than the steps."""
    frozen_or_not = [
        shapes_spec(f"{name} zero{stage} {how}", stage, 4, 1, 3, *freeze, *options)
        for name, freeze in (("frozen", ["model.freeze_vit=true"]), ("learning", []))
        for stage in STAGES
        for how, options in (("direct", ()), ("recomputed", (*RECOMPUTED, "model.vit_ckpt_layer=2")))
    ]
    shared_out = [
        *(shapes_spec(f"zero{stage}", stage, 8, 1, 8, *LEARN) for stage in STAGES),
        shapes_spec("accumulated", 2, 4, 2, 8, *LEARN),
        shapes_spec("checkpointed", 3, 8, 1, 8, *LEARN, *RECOMPUTED),
    ]
    cached = [
        shapes_spec(name, stage, 4, 1, 3, "model.freeze_vit=true", f"model.cache_image_embeds={embeds_folder}")
        for name, stage in (("cached", 3), ("found", 0))
    ]
    compiled = [shapes_spec(f"compiled zero{stage}", stage, 4, 1, 3, "run.compile=true") for stage in range(4)]
    return train(tmp_path_factory.mktemp("two_ranks"), 2, [*shared_out, *frozen_or_not, *cached, *compiled])


def test_one_computation_however_it_is_shared_out(two_ranks, tmp_path):
    """8 steps of 16 images; 70 images an epoch, so that the fifth global batch is completed with fillers."""
    one = train(tmp_path, 1, [shapes_spec("one rank", 0, 16, 1, 8, *LEARN)])["one rank"]
    for name in ("zero0", "zero1", "zero2", "zero3", "accumulated", "checkpointed"):
        agrees(two_ranks[name], one, name)
    assert one["losses"][-1] < one["losses"][0] - 1


@pytest.mark.parametrize("encoder", ["frozen", "learning"])
@pytest.mark.parametrize("stage", STAGES)
def test_freezing_and_recomputing_under_every_stage(two_ranks, encoder, stage):
    """freeze_vit x ZeRO 0 to 3 x activation checkpointing: recomputed activations and partitions change nothing."""
    for how in ("direct", "recomputed"):
        agrees(two_ranks[f"{encoder} zero{stage} {how}"], two_ranks[f"{encoder} zero0 direct"], how)


def test_a_frozen_encoder_makes_another_run(two_ranks):
    frozen, learning = (two_ranks[f"{encoder} zero3 recomputed"]["losses"] for encoder in ("frozen", "learning"))
    assert frozen[0] == pytest.approx(learning[0], rel=1e-6)
    assert frozen[-1] != pytest.approx(learning[-1], rel=1e-6)


@pytest.mark.parametrize("stage", range(4))
def test_compiled_layers_make_the_same_run(two_ranks, stage):
    agrees(two_ranks[f"compiled zero{stage}"], two_ranks["learning zero0 direct"], stage)


def test_features_from_disk_make_the_same_run(two_ranks, embeds_folder):
    """Features are kept in bf16, whose rounding is a 256th; "found" reads those that "cached" wrote."""
    assert two_ranks["cached"]["losses"] == pytest.approx(two_ranks["frozen zero0 direct"]["losses"], rel=1e-3)
    agrees(two_ranks["found"], two_ranks["cached"], "found")
    (rows,) = embeds_folder.glob("*.bf16")
    (done,) = embeds_folder.glob("*.done")
    assert rows.stat().st_size == 70 * 17 * 128 * 2  # 4 x 4 patches and the class token
    assert done.read_bytes() == b"\x01" * 70


@pytest.fixture(scope="module")
def small_engines(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "engines.json"
    process = launch(1, "tests/engine/accumulated.py", path)
    assert process.returncode == 0, process.stdout[-4000:]
    return json.loads(path.read_text())


def test_bf16_adds_small_gradients_up(small_engines):
    """1 and fifteen times 2^-9, which bf16 would add to 1; stage 1 rounds the sum once, to a 256th."""
    assert small_engines["sums"] == {"1": pytest.approx(1 + 15 / 512, rel=2**-8), "2": 1 + 15 / 512, "3": 1 + 15 / 512}


def test_a_closed_engine_keeps_nothing(small_engines):
    """Of 14 bytes a weight or more; else the test split would be captioned beside the model that was trained."""
    for stage, (held, kept) in small_engines["memory"].items():
        assert held >= 14 * 16 - 1 and kept < 16, stage


def agrees(result, reference, name):
    assert result["losses"] == pytest.approx(reference["losses"], rel=1e-4), name
    assert result["grad_norms"] == pytest.approx(reference["grad_norms"], rel=1e-3), name
    assert result["weight_sums"] == pytest.approx(reference["weight_sums"], rel=1e-3, abs=1e-3), name
