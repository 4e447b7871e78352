"""launch/export.py: round trips are bit-equal, exports compute the same, and nothing is overwritten unasked."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import REPOSITORY, launch, launch_as_typed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from blipds.captioning.captioner import Captioner
from blipds.config.run import load_run_config
from blipds.config.sections import Config
from blipds.errors import UserError
from blipds.models import build_model
from blipds.models.blip.model import BlipCaption
from blipds.models.vision import layer_norm_eps
from blipds.models.weights import load_weights, open_weights

PROMPT = "a picture of "
Export = Callable[..., str]


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Export:
    """export("--format", "hf", ...) runs the command line's main() in this process; returns what it printed."""
    spec = importlib.util.spec_from_file_location("export", REPOSITORY / "launch" / "export.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        script.main()
        return capsys.readouterr().out

    return run


def write_config(folder: Path, model: dict[str, Any], **vis_processor: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    dataset = {"vis_processor": {"eval": vis_processor}} if vis_processor else {}
    given = {"model": model, "datasets": {"flickr8k_caption": dataset}, "run": {"num_beams": 1}}
    (folder / "run.yaml").write_text(yaml.safe_dump(given))
    return folder / "run.yaml"


def tiny(**other: Any) -> dict[str, Any]:
    kwargs = {"embed_dim": 24, "depth": 2, "num_heads": 4, "patch_size": 8}
    return {"model_type": "tiny", "vit_kwargs": kwargs, "image_size": 32, **other}


def build(config: Config) -> BlipCaption:
    torch.manual_seed(0)
    return build_model(config.model, lambda function, *inputs: function(*inputs)).eval()


def our_model(config: Config, location: Path) -> BlipCaption:
    model = build(config)
    load_weights(model, open_weights(str(location), Path()), lambda line: None)
    return model


def save(path: Path, model: BlipCaption) -> Path:
    """As a run's checkpoint has its weights (engine/checkpoints.py)."""
    metadata = {"format": "blipds", "config": json.dumps(model.constants())}
    save_file(dict(model.named_parameters()), path, metadata=metadata)
    return path


@pytest.fixture
def oracle_config(shared: Path, tmp_path: Path) -> Path:
    kwargs = {"embed_dim": 96, "depth": 4, "num_heads": 4}
    med_config = str(shared / "oracle" / "med_config.json")
    return write_config(tmp_path, {"vit_kwargs": kwargs, "image_size": 96, "med_config_path": med_config})


# The same tensors, the same numbers


def test_round_trip_is_bit_equal(export: Export, oracle_config: Path, shared: Path, tmp_path: Path) -> None:
    """BLIP -> blipds -> transformers -> blipds -> BLIP"""
    config, _ = load_run_config(oracle_config)
    original = shared / "oracle" / "tiny_blip.pth"
    first = save(tmp_path / "first.safetensors", our_model(config, original))
    common = ("--cfg-path", oracle_config, "--checkpoint")
    export(*common, first, "--format", "hf", "--output", tmp_path / "hf")
    second = save(tmp_path / "second.safetensors", our_model(config, tmp_path / "hf"))
    export(*common, second, "--format", "blip", "--output", tmp_path / "back.pth")

    expected = torch.load(original, weights_only=True)["model"]
    found = torch.load(tmp_path / "back.pth", weights_only=True)
    assert found["model"].keys() == expected.keys()
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in expected.items())
    assert found["config"]["image_size"] == 96 and found["config"]["vision_layer_norm_eps"] == 1e-6


def test_exported_folder_computes_and_captions_as_we_do(
    export: Export, oracle_config: Path, shared: Path, tmp_path: Path
) -> None:
    from PIL import Image
    from transformers import AutoProcessor, BlipForConditionalGeneration

    original = shared / "oracle" / "tiny_blip.pth"
    export("--cfg-path", oracle_config, "--checkpoint", original, "--format", "hf", "--output", tmp_path / "hf")
    theirs, info = BlipForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    theirs.eval()
    config, _ = load_run_config(oracle_config)
    ours = our_model(config, original)

    golden = json.loads((shared / "oracle" / "golden.json").read_text())["generate"]
    photographs = [Image.open(shared / "data" / "flickr8k" / "images" / name) for name in golden["images"]]
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    inputs = processor(images=photographs, text=[PROMPT] * 64, return_tensors="pt")
    assert_same_logits(ours, theirs, inputs["pixel_values"][:8], atol=1e-4)
    ids = theirs.generate(**inputs, num_beams=1, do_sample=False, max_length=20, min_length=5)
    found = [text[len(PROMPT) :] for text in processor.batch_decode(ids, skip_special_tokens=True)]
    captioner = Captioner.from_config(config)
    captions = captioner.caption(ours, {"pixel_values": inputs["pixel_values"]}, golden["images"])
    assert found == [caption.text for caption in captions]
    assert found == golden["captions"]["greedy_max20_min5"]


def assert_same_logits(ours: BlipCaption, theirs: Any, pixels: Tensor, atol: float) -> None:
    ids = torch.randint(1000, 30000, (len(pixels), 7), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = 30522
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, input_ids=ids).logits
        image_embeds = ours.visual_encoder(pixels)
        found = ours.text_decoder(ids, image_embeds, label_positions=torch.arange(ids.numel())).view_as(expected)
    assert expected.std() > 0.1  # there is something to compare
    print(f"largest difference of logits: {(found - expected).abs().max():.1e} at a scale of {expected.std():.1e}")
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_base_geometry_both_ways(export: Export, tmp_path: Path) -> None:
    """A random BlipForConditionalGeneration of BLIP base, with the epsilon of transformers' own default (1e-5)."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    torch.manual_seed(0)
    vision, text = {"image_size": 224}, {"num_attention_heads": 12, "encoder_hidden_size": 768}
    theirs = BlipForConditionalGeneration(BlipConfig(vision_config=vision, text_config=text)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    theirs.save_pretrained(tmp_path / "theirs")
    config_path = write_config(tmp_path, {"image_size": 224})
    config, _ = load_run_config(config_path)
    pixels = torch.randn(2, 3, 224, 224)
    ours = our_model(config, tmp_path / "theirs")
    assert layer_norm_eps(ours.visual_encoder) == 1e-5
    assert_same_logits(ours, theirs, pixels, atol=1e-4)
    del theirs

    checkpoint = save(tmp_path / "ours.safetensors", ours)
    export("--cfg-path", config_path, "--checkpoint", checkpoint, "--format", "hf", "--output", tmp_path / "again")
    checkpoint.unlink()
    files = (tmp_path / "theirs" / "model.safetensors", tmp_path / "again" / "model.safetensors")
    with safe_open(files[0], "pt") as stored, safe_open(files[1], "pt") as again:
        assert set(stored.keys()) == set(again.keys())
        assert all(torch.equal(stored.get_tensor(name), again.get_tensor(name)) for name in stored.keys())  # noqa: SIM118
    settings = json.loads((tmp_path / "again" / "config.json").read_text())
    assert settings["vision_config"]["layer_norm_eps"] == 1e-5
    loaded = BlipForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    assert_same_logits(ours, loaded, pixels, atol=1e-4)


# Geometry that only one of the formats holds


def test_layer_scale_goes_to_blip_alone(export: Export, tmp_path: Path) -> None:
    config_path = write_config(tmp_path, tiny(vit_type="vit_small_patch14_reg4_dinov2"))
    config, _ = load_run_config(config_path)
    model = build(config)
    common = ("--cfg-path", config_path, "--checkpoint", save(tmp_path / "model.safetensors", model))
    reason = "image encoder's layer scale, 4 register tokens, class token without a position; export with --format blip"
    with pytest.raises(UserError, match=reason):
        export(*common, "--format", "hf", "--output", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    export(*common, "--format", "blip", "--output", tmp_path / "model.pth")
    again = our_model(config, tmp_path / "model.pth")
    parameters = dict(again.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in model.named_parameters())


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"qk_norm": True}, "norms inside the attention"),
        ({"qkv_bias": False}, "attention without biases"),
        ({"pre_norm": True}, "norm before the blocks, patch embedding"),
        ({"final_norm": False}, "lack of a final norm"),
        ({"class_token": False}, "lack of a class token"),
        ({"act_layer": "quick_gelu"}, r"activation \(QuickGELU\)"),
        ({"act_layer": "gelu_tanh"}, r"activation \(GELUTanh\)"),
        ({"norm_layer": "rmsnorm"}, r"norm \(RmsNorm\)"),
    ],
)
def test_what_transformers_blip_has_not(export: Export, tmp_path: Path, kwargs: dict[str, Any], reason: str) -> None:
    section = tiny()
    section["vit_kwargs"] |= kwargs
    config_path = write_config(tmp_path, section)
    checkpoint = save(tmp_path / "model.safetensors", build(load_run_config(config_path)[0]))
    with pytest.raises(UserError, match=f"cannot express the image encoder's {reason}; export with"):
        export("--cfg-path", config_path, "--checkpoint", checkpoint, "--format", "hf", "--output", tmp_path / "hf")


# Runs


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What a run leaves behind, with two checkpoints: the best (step 20) and the latest."""
    folder = tmp_path / "run"
    config_path = write_config(folder, tiny(), mean=[0.4, 0.5, 0.6], std=[0.2, 0.2, 0.2])
    config_path.rename(folder / "config.yaml")
    model = build(load_run_config(folder / "config.yaml")[0])
    for step in (20, 30):
        checkpoint = folder / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        with torch.no_grad():
            model.visual_encoder.norm.bias.fill_(step)
        save(checkpoint / "model.safetensors", model)
        (checkpoint / "state.json").write_text(json.dumps({"run": {"global_step": step}, "shape": {}, "engine": {}}))
    (folder / "checkpoints" / "best").symlink_to("step_00000020")
    (folder / "checkpoints" / "latest").symlink_to("step_00000030")
    lines = [
        {"kind": "train", "step": 20, "epoch": 1, "loss": 1.0},
        evaluation("val", 10, 0.1, "training weights, bf16"),
        evaluation("val", 20, 0.3, "training weights, bf16"),
        evaluation("val", 30, 0.2, "training weights, bf16"),
        evaluation("test", 30, 0.25, f"{folder}/checkpoints/step_00000020, fp32"),
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "eval", "spl')  # a crash tore the last line
    return folder


def evaluation(split: str, step: int, cider: float, note: str) -> dict[str, Any]:
    values = {"CIDEr": cider, "Bleu_4": 0.125, "METEOR": None, "agg_metrics": cider + 0.125}
    return {"kind": "eval", "split": split, "epoch": 0, "step": step, **values, "missing": {}, "note": note}


def test_a_run_directory_means_its_best(export: Export, run_dir: Path, tmp_path: Path) -> None:
    export("--checkpoint", run_dir, "--format", "hf", "--output", tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert weights["vision_model.post_layernorm.bias"].unique().tolist() == [20.0]
    card = (tmp_path / "hf" / "README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert rows == [
        "| split | step | CIDEr | Bleu_4 | weights |",
        "| val | 20 | 0.3000 | 0.1250 | training weights, bf16 |",
        "| test | 30 | 0.2500 | 0.1250 | step_00000020, fp32 |",
    ]
    assert "model_type: tiny" in card and "num_beams=1, max_length=20" in card
    image_processor = json.loads((tmp_path / "hf" / "processor_config.json").read_text())["image_processor"]
    assert (image_processor["image_mean"], image_processor["image_std"]) == ([0.4, 0.5, 0.6], [0.2, 0.2, 0.2])
    assert image_processor["size"] == {"height": 32, "width": 32}


def test_one_of_a_run_s_checkpoints(export: Export, run_dir: Path, tmp_path: Path) -> None:
    for number, location in enumerate(("latest", "step_00000030", "step_00000030/model.safetensors")):
        output = tmp_path / f"{number}.pth"
        export("--checkpoint", run_dir / "checkpoints" / location, "--format", "blip", "--output", output)
        assert torch.load(output, weights_only=True)["model"]["visual_encoder.norm.bias"][0] == 30


def test_a_checkpoint_outside_a_run_needs_a_config(export: Export, run_dir: Path, tmp_path: Path) -> None:
    lone = (run_dir / "checkpoints" / "best" / "model.safetensors").rename(tmp_path / "lone.safetensors")
    with pytest.raises(UserError, match=r"lies in no run directory.*--cfg-path"):
        export("--checkpoint", lone, "--format", "blip", "--output", tmp_path / "x.pth")
    export(
        "--cfg-path", run_dir / "config.yaml", "--checkpoint", lone, "--format", "blip", "--output", tmp_path / "x.pth"
    )


def test_nothing_is_overwritten_unasked(export: Export, run_dir: Path, tmp_path: Path) -> None:
    blip = ("--checkpoint", run_dir, "--format", "blip", "--output")
    (tmp_path / "x.pth").write_text("mine")
    with pytest.raises(UserError, match=r"x\.pth exists already.*--force"):
        export(*blip, tmp_path / "x.pth")
    assert (tmp_path / "x.pth").read_text() == "mine"
    export(*blip, tmp_path / "x.pth", "--force")
    assert "model" in torch.load(tmp_path / "x.pth", weights_only=True)
    with pytest.raises(UserError, match="writes one file"):
        export(*blip, tmp_path, "--force")

    folder = ("--checkpoint", run_dir, "--format", "hf", "--output")
    export(*folder, tmp_path / "hf")
    with pytest.raises(UserError, match=r"exists already.*--force"):
        export(*folder, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    export(*folder, tmp_path / "hf", "--force")
    assert (tmp_path / "hf" / "model.safetensors").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not an earlier export"):
        export(*folder, tmp_path / "home", "--force")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "mine"


def test_the_command_line(run_dir: Path, tmp_path: Path) -> None:
    typed = ("--checkpoint", run_dir, "--format", "blip", "--output", tmp_path / "x.pth")
    exported = launch_as_typed(1, "launch/export.py", *typed)
    assert exported.returncode == 0, exported.stdout
    refused = launch(1, "launch/export.py", *typed)
    assert refused.returncode == 1
    loaded, error = refused.stdout.splitlines()
    assert loaded.startswith("weights: ") and error.startswith("error: ")
