"""Adapters as peft's files and merged: transformers computes what we do; other commands take them."""

import importlib.util
import json
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from launching import REPOSITORY
from safetensors.torch import save_file

from blipds.captioning.captioner import caption_recipe, load_caption_model
from blipds.config.run import load_run_config
from blipds.errors import UserError
from blipds.evaluation.evaluator import load_model
from blipds.models import build_trained
from blipds.models.protocol import keep_activations
from blipds.models.weights import load_weights, open_weights

CPU = torch.device("cpu")
IDS = torch.randint(1000, 30000, (2, 7), generator=torch.Generator().manual_seed(3))
PIXELS = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def export():
    """export("--format", "hf", ...) runs the command line's main() in this process."""
    spec = importlib.util.spec_from_file_location("export", REPOSITORY / "launch" / "export.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
            script.main()

    return run


def write_run(folder, base, med_config, **lora):
    """A run directory with a checkpoint of adapters on the oracle, all of them drawn; and the model."""
    section = {
        "vit_kwargs": {"embed_dim": 96, "depth": 4, "num_heads": 4},
        "image_size": 96,
        "med_config_path": str(med_config),
        "load_finetuned": False,
        "pretrained": str(base),
        "lora": {"r": 4, "alpha": 8, **lora},
    }
    checkpoint = folder / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    given = {"model": section, "datasets": {"flickr8k_caption": {}}, "run": {"num_beams": 1}}
    (folder / "config.yaml").write_text(yaml.safe_dump(given))
    config, _ = load_run_config(folder / "config.yaml")
    model = build_trained(config.model, keep_activations).eval()
    load_weights(model, open_weights(str(base), folder), lambda line: None)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    metadata = {"format": "blipds", "config": json.dumps(model.checkpoint_config())}
    save_file(tensors, checkpoint / "model.safetensors", metadata=metadata)
    return model


@pytest.fixture(scope="module")
def oracle(shared):
    return shared / "oracle" / "tiny_blip.pth", shared / "oracle" / "med_config.json"


@pytest.fixture(scope="module")
def run_dir(oracle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    return folder, write_run(folder, *oracle, train_also=["cls.predictions.transform.*"])


@pytest.fixture(scope="module")
def base(run_dir, export, oracle, tmp_path_factory):
    """The base as a transformers folder."""
    path = tmp_path_factory.mktemp("base") / "hf"
    export("--cfg-path", run_dir[0] / "config.yaml", "--checkpoint", oracle[0], "--format", "hf", "--output", path)
    return path


@pytest.fixture(scope="module")
def folder(run_dir, export, tmp_path_factory):
    """The adapters as peft's folder."""
    path = tmp_path_factory.mktemp("peft") / "adapters"
    export("--checkpoint", run_dir[0], "--format", "lora", "--output", path)
    return path


@torch.no_grad()
def our_logits(model):
    embeds = model.visual_encoder(PIXELS)
    return model.text_decoder(IDS, embeds, label_positions=torch.arange(IDS.numel())).view(*IDS.shape, -1)


@torch.no_grad()
def their_logits(model):
    return model.eval()(pixel_values=PIXELS, input_ids=IDS).logits


def test_peft_loads_what_is_exported(run_dir, base, folder):
    from peft import PeftModel
    from transformers import BlipForConditionalGeneration

    theirs = BlipForConditionalGeneration.from_pretrained(base)
    before = their_logits(theirs)
    adapted = PeftModel.from_pretrained(theirs, folder)
    expected = our_logits(run_dir[1])
    assert (before - expected).abs().max() > 0.1
    torch.testing.assert_close(their_logits(adapted), expected, rtol=0, atol=1e-5)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    learning = sum(p.numel() for p in run_dir[1].parameters() if p.requires_grad)
    assert 4 * learning < (folder / "adapter_model.safetensors").stat().st_size < 4 * learning + 30_000


def test_merged_exports_compute_the_same(run_dir, export, tmp_path):
    from transformers import BlipForConditionalGeneration

    run, model = run_dir
    export("--checkpoint", run, "--format", "hf", "--merge", "--output", tmp_path / "hf")
    expected = our_logits(model)
    theirs = BlipForConditionalGeneration.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(their_logits(theirs), expected, rtol=0, atol=1e-5)
    export("--checkpoint", run, "--format", "blip", "--merge", "--output", tmp_path / "merged.pth")
    recipe = caption_recipe(str(tmp_path / "merged.pth"), None, [])
    merged = load_caption_model(recipe, 1, CPU, "fp32", lambda line: None).model
    torch.testing.assert_close(our_logits(merged), expected, rtol=0, atol=1e-5)


def test_commands_take_a_run_and_a_folder(run_dir, base, folder, oracle, tmp_path):
    run, model = run_dir
    expected = our_logits(model)
    recipes = [
        caption_recipe(str(run / "checkpoints" / "step_00000001"), None, []),
        caption_recipe(str(folder), None, [], str(base)),
        caption_recipe(str(folder), run / "config.yaml", []),
    ]
    for recipe in recipes:
        found = load_caption_model(recipe, 1, CPU, "fp32", lambda line: None).model
        torch.testing.assert_close(our_logits(found), expected, rtol=0, atol=1e-5)
    config, _ = load_run_config(run / "config.yaml")
    config.model = replace(config.model, lora=None)
    for checkpoint in (run, folder):
        found = load_model(config, str(checkpoint), MockCaptioner(), CPU, torch.float32, lambda line: None)
        torch.testing.assert_close(our_logits(found), expected, rtol=0, atol=1e-5)
    # training goes on with them
    config, _ = load_run_config(run / "config.yaml")
    again = build_trained(config.model, keep_activations).eval()
    load_weights(again, open_weights(str(folder), tmp_path), lambda line: None)
    assert torch.equal(our_logits(again), expected)
    assert again.lora.base == model.lora.base and again.lora.base["base"] == str(oracle[0])


class MockCaptioner:
    def check_model(self, model):
        pass


def test_what_peft_wrote_itself(run_dir, base, tmp_path):
    """Its own folder, of the default rank and of targets by their last name; without a hash of the base."""
    from peft import LoraConfig, get_peft_model
    from transformers import BlipForConditionalGeneration

    torch.manual_seed(2)
    config = LoraConfig(target_modules=["query", "qkv"], init_lora_weights=False)
    theirs = get_peft_model(BlipForConditionalGeneration.from_pretrained(base), config)
    theirs.save_pretrained(tmp_path)
    found = load_caption_model(caption_recipe(str(tmp_path), None, []), 1, CPU, "fp32", lambda line: None).model
    torch.testing.assert_close(our_logits(found), their_logits(theirs), rtol=0, atol=1e-5)

    stated = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(stated | {"use_dora": True}))
    with pytest.raises(UserError, match=r"use_dora is True; only plain LoRA can be read"):
        load_weights(run_dir[1], open_weights(str(tmp_path), tmp_path), lambda line: None)


def test_what_an_export_refuses(run_dir, export, oracle, tmp_path):
    run, config = run_dir[0], run_dir[0] / "config.yaml"
    output = ("--output", tmp_path / "x")
    for arguments, said in (
        (
            ("--checkpoint", run, "--format", "hf"),
            "holds adapters; allowed: --format lora, or another format",
        ),
        (("--checkpoint", run, "--format", "lora", "--merge"), "holds adapters; allowed: --format lora, or another"),
        (("--cfg-path", config, "--checkpoint", oracle[0], "--format", "lora"), "--format lora: .* holds no adapters"),
        (
            ("--cfg-path", config, "--checkpoint", oracle[0], "--format", "hf", "--merge"),
            "--merge: .* holds no adap",
        ),
    ):
        with pytest.raises(UserError, match=said):
            export(*arguments, *output)
    write_run(tmp_path / "run", *oracle, train_also=["visual_encoder.cls_token"])
    with pytest.raises(UserError, match=r"--format lora: visual_encoder\.cls_token learnt beside the adapters"):
        export("--checkpoint", tmp_path / "run", "--format", "lora", *output)
