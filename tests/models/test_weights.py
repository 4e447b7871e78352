"""What a model starts from: whole checkpoints, an image encoder, a BERT; and the constants that no tensor shows."""

import json
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from checkpoint_samples import open_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from blipds import cli
from blipds.config.sections import Config, DatasetConfig
from blipds.errors import UserError
from blipds.models import build_model, vision
from blipds.models.blip.checkpoints import interpolate_pos_embed
from blipds.models.blip.config import BlipConfig
from blipds.models.blip.export import save_blip, transformers_config
from blipds.models.blip.geometry import geometry_of
from blipds.models.blip.model import BlipCaption
from blipds.models.initialisation import initialise
from blipds.models.parameters import copy_into
from blipds.models.vision import encoder_mean_std, hub_name_of, layer_norm_eps
from blipds.models.weights import fill_image_statistics, load_initial_weights, load_weights, open_weights

WIDTH, DEPTH = 24, 2
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
# DINOv2's shape (layer scale, patches of 14), and the one with registers and positions for the grid alone
ENCODERS = ("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_tiny_patch16_224")


def section(tmp_path: Path, **keys: Any) -> BlipConfig:
    """A tiny model; its decoder is 16 wide, 2 layers, 4 heads, 10 positions."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    text = {**sizes, "max_position_embeddings": 50, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "med.json").write_text(json.dumps(text))
    given: dict[str, Any] = {
        "vit_kwargs": {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4, "patch_size": 8},
        "image_size": 32,
        "med_config_path": str(tmp_path / "med.json"),
        "load_finetuned": False,
        "load_pretrained": False,
    }
    return BlipConfig(**(given | keys))


def build(config: BlipConfig) -> BlipCaption:
    torch.manual_seed(0)
    return build_model(config, lambda function, *inputs: function(*inputs)).eval()


def start(config: BlipConfig) -> tuple[BlipCaption, BlipCaption, list[str]]:
    """The model after loading, the same with random weights alone, and what was said."""
    lines: list[str] = []
    loaded, before = build(config), build(config)
    load_initial_weights(loaded, Config(model=config), lines.append)
    initialise(before, Config().run.seed, partial(copy_into, before))
    return loaded, before, lines


def changed(loaded: BlipCaption, before: BlipCaption) -> dict[str, Tensor]:
    old = dict(before.named_parameters())
    return {name: p.detach() for name, p in loaded.named_parameters() if not torch.equal(p, old[name])}


def encoder_weights(vit_type: str, image_size: int, **kwargs: Any) -> dict[str, Tensor]:
    """Drawn weights in timm's layout."""
    model = timm.create_model(vit_type, num_classes=0, img_size=image_size, embed_dim=WIDTH, depth=DEPTH, **kwargs)
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(t.shape, generator=generator) for name, t in model.state_dict().items()}


# The image encoder


@pytest.mark.parametrize("vit_type", ENCODERS)
def test_encoder_of_another_grid_in_half_precision(tmp_path: Path, vit_type: str) -> None:
    kwargs = {"num_heads": 4, "patch_size": 8}
    weights = {name: tensor.half() for name, tensor in encoder_weights(vit_type, 72, **kwargs).items()}
    save_file(weights, tmp_path / "vit.safetensors")
    loaded, before, lines = start(
        section(tmp_path, vit_type=vit_type, vit_pretrained=str(tmp_path / "vit.safetensors"))
    )
    prefix = {"vit_small_patch14_reg4_dinov2": 0}.get(vit_type, 1)
    weights["pos_embed"] = interpolate_pos_embed(weights["pos_embed"], prefix + 16, prefix)
    found = dict(loaded.visual_encoder.named_parameters())
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor.float()), name
    assert changed(loaded, before).keys() == {"visual_encoder." + name for name in weights}
    assert any(
        f"pos_embed interpolated from (1, {prefix + 81}, 24) to (1, {prefix + 16}, 24)" in line for line in lines
    )


def test_the_shared_encoder_starts_the_small_run(shared: Path, tmp_path: Path) -> None:
    path = shared / "weights" / "vit_small_patch14.fp16.safetensors"
    kwargs = {"embed_dim": 384, "depth": 12, "num_heads": 6, "patch_size": 14}
    config = section(
        tmp_path, vit_type="vit_small_patch14_dinov2", vit_kwargs=kwargs, image_size=224, vit_pretrained=str(path)
    )
    loaded, _, _ = start(config)
    stored, found = load_file(path), loaded.visual_encoder.state_dict()
    assert torch.equal(found["blocks.11.ls2.gamma"], stored["blocks.11.ls2.gamma"].float())
    assert torch.equal(found["pos_embed"], interpolate_pos_embed(stored["pos_embed"], 257).float())
    # what timm computes with the stored weights at their own grid is what ours computes there
    own = timm.create_model("vit_small_patch14_dinov2", num_classes=0, global_pool="", img_size=518)
    own.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    own.set_input_size((224, 224))
    own.pos_embed.data.copy_(found["pos_embed"])
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(loaded.visual_encoder(pixels), own.eval()(pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("source", "asked"), [(True, "vit_tiny_patch16_224"), ("timm/x.y", "hf-hub:timm/x.y")])
def test_timm_s_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: bool | str, asked: str) -> None:
    """The network is a stand-in here: a model of timm's with drawn weights, as `pretrained=True` would return it."""
    weights = encoder_weights("vit_tiny_patch16_224", 72, num_heads=4, patch_size=8)
    genuine = timm.create_model

    def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
        if not pretrained:
            return genuine(name, pretrained, **kwargs)
        assert (name, kwargs) == (asked, {"num_classes": 0})
        model = torch.nn.Module()
        model.state_dict = lambda: weights | {"fc_norm.bias": torch.zeros(1)}  # type: ignore[method-assign, assignment]
        return model

    monkeypatch.setattr(vision.timm, "create_model", create_model)
    loaded, _, _ = start(section(tmp_path, vit_type="vit_tiny_patch16_224", vit_pretrained=source))
    assert torch.equal(loaded.visual_encoder.norm.weight, weights["norm.weight"])
    assert torch.equal(loaded.visual_encoder.pos_embed, interpolate_pos_embed(weights["pos_embed"], 17))


def test_weights_that_timm_cannot_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no\nnetwork")

    monkeypatch.setattr(vision.timm, "create_model", offline)
    with pytest.raises(UserError, match=r"timm has no weights for 'large' \(no network\)"):
        vision.pretrained_encoder("large")


def test_another_kind_or_depth_is_refused(tmp_path: Path) -> None:
    save_file(encoder_weights("vit_tiny_patch16_224", 32, num_heads=4, patch_size=4), tmp_path / "patches.safetensors")
    with pytest.raises(UserError, match=r"patch_embed\.proj\.weight \(\(24, 3, 4, 4\) in the file"):
        start(section(tmp_path, vit_pretrained=str(tmp_path / "patches.safetensors")))
    save_file({"embeddings.word_embeddings.weight": torch.zeros(30522, 16)}, tmp_path / "bert.safetensors")
    with pytest.raises(UserError, match="a bert checkpoint, not a timm one"):
        start(section(tmp_path, vit_pretrained=str(tmp_path / "bert.safetensors")))
    with pytest.raises(UserError, match="a timm checkpoint, not a bert one"):
        start(section(tmp_path, text_pretrained=str(tmp_path / "patches.safetensors")))
    with pytest.raises(UserError, match=r"holds one part only \(timm\); give it as model\.vit_pretrained"):
        start(section(tmp_path, load_finetuned=True, finetuned=str(tmp_path / "patches.safetensors")))


# The text decoder


def bert(folder: Path, heads: int = 4, layers: int = 3) -> dict[str, Tensor]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "num_attention_heads": heads, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=30522, num_hidden_layers=layers, **sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model.state_dict()


def test_bert_of_more_layers_and_positions(tmp_path: Path) -> None:
    stored = bert(tmp_path / "bert")
    loaded, before, lines = start(section(tmp_path, text_pretrained=str(tmp_path / "bert")))
    found = changed(loaded, before)
    expected = {
        f"text_decoder.bert.{name}"
        for name in stored
        if not name.startswith(("pooler", "encoder.layer.2")) and "token_type" not in name
    }
    assert found.keys() == expected
    for name in expected:
        rows = len(found[name])
        assert torch.equal(found[name][:30522], stored[name.removeprefix("text_decoder.bert.")][:rows]), name
    words = before.text_decoder.bert.embeddings.word_embeddings.weight
    assert torch.equal(found["text_decoder.bert.embeddings.word_embeddings.weight"][30522:], words[30522:])
    assert "; 25 of its part of the model" in lines[0]  # cross-attention: 2 x 10, the head: 5


def test_bert_of_other_heads_gives_its_embeddings_alone(tmp_path: Path) -> None:
    bert(tmp_path / "bert", heads=2)
    loaded, before, lines = start(section(tmp_path, text_pretrained=str(tmp_path / "bert")))
    assert all(name.startswith("text_decoder.bert.embeddings.") for name in changed(loaded, before))
    assert len(changed(loaded, before)) == 4
    assert "left out, num_attention_heads is 2 in the file, 4 in the decoder" in lines[0]


def test_a_whole_checkpoint_comes_before_parts(tmp_path: Path) -> None:
    whole = build(section(tmp_path))
    save_blip(tmp_path / "whole.pth", dict(whole.named_parameters()), {})
    loaded, _, lines = start(
        section(tmp_path, load_pretrained=True, pretrained=str(tmp_path / "whole.pth"), text_pretrained="no/such")
    )
    assert changed(loaded, whole) == {}
    assert lines[1].startswith("not used: model.text_pretrained")


# Constants


def transformers_folder(folder: Path, model: BlipCaption, **vision_config: Any) -> None:
    from transformers import BlipConfig, BlipForConditionalGeneration

    config = transformers_config(geometry_of(model))
    config["vision_config"] |= vision_config
    BlipForConditionalGeneration(BlipConfig(**config)).save_pretrained(folder)


def test_a_transformers_folder_brings_its_epsilon(tmp_path: Path) -> None:
    model = build(section(tmp_path))
    assert layer_norm_eps(model.visual_encoder) == 1e-6
    transformers_folder(tmp_path / "hf", model, layer_norm_eps=1e-5)
    lines: list[str] = []
    load_weights(model, open_weights(str(tmp_path / "hf"), tmp_path), lines.append)
    assert layer_norm_eps(model.visual_encoder) == 1e-5
    assert lines[-1] == "  vision LayerNorm epsilon 1e-05: config.json states it (the original BLIP has 1e-6)"

    # what is trained from it keeps it: our files say so, and so does a .pth
    assert model.constants() == {"vision_layer_norm_eps": 1e-5}
    save_blip(tmp_path / "tuned.pth", dict(model.named_parameters()), model.constants())
    again = build(section(tmp_path))
    load_weights(again, open_weights(str(tmp_path / "tuned.pth"), tmp_path), lines.append)
    assert layer_norm_eps(again.visual_encoder) == 1e-5
    assert lines[-1] == "  vision LayerNorm epsilon 1e-05: the checkpoint says so"

    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["vision_config"]["layer_norm_eps"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    line = again.take_constants(open_checkpoint(tmp_path / "hf"))
    assert layer_norm_eps(again.visual_encoder) == 1e-6
    assert line == "vision LayerNorm epsilon 1e-06: no config.json states one, and the original has 1e-6"


def test_heads_are_seen_in_the_config_alone(tmp_path: Path) -> None:
    model = build(section(tmp_path))
    transformers_folder(tmp_path / "hf", model, num_attention_heads=8)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UserError, match="vision_heads is 8 in the checkpoint, 4 in the model"):
        load_weights(model, open_weights(str(tmp_path / "hf"), tmp_path), lambda line: None)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# mean and std


def test_statistics_are_the_encoder_s_unless_given() -> None:
    parts = {"load_finetuned": False, "load_pretrained": False}
    config = Config(
        model=BlipConfig(vit_type="vit_small_patch14_dinov2", vit_pretrained=True, **parts),
        datasets={"custom_caption": DatasetConfig()},
    )
    processors = config.datasets["custom_caption"].vis_processor
    processors.train.mean = [0.1, 0.2, 0.3]
    assert len(fill_image_statistics(config)) == 1
    assert (processors.train.mean, processors.train.std) == ([0.1, 0.2, 0.3], IMAGENET[1])
    assert (processors.eval.mean, processors.eval.std) == IMAGENET
    assert fill_image_statistics(config) == []

    both = Config(model=BlipConfig(vit_pretrained=True), datasets={"custom_caption": DatasetConfig()})
    with pytest.raises(UserError, match=r"asks for a whole checkpoint: drop one, or give mean and std"):
        fill_image_statistics(both)

    plain = Config(datasets={"custom_caption": DatasetConfig()})
    assert fill_image_statistics(plain) == []
    assert plain.datasets["custom_caption"].vis_processor.eval.mean is None


def test_the_resolved_config_carries_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("""
        model: {model_type: tiny, vit_type: vit_small_patch14_dinov2, vit_pretrained: some/path/vit.safetensors}
        datasets: {shapes_caption: {}}
        run: {lr_scale: {visual_encoder: 0.1, text_decoder.cls: 2}, lr_layer_decay: 0.75}
    """)
    args = Namespace(cfg_path=tmp_path / "run.yaml", options=["run.lr_scale.text_decoder=3"], plugin=[])
    config = cli.load_config(args)
    (tmp_path / "config.yaml").write_text(cli.as_yaml(config))
    assert capsys.readouterr().out.startswith("images: mean [0.485, 0.456, 0.406]")
    again = cli.load_config(Namespace(cfg_path=tmp_path / "config.yaml", options=[], plugin=[]))
    assert again == config
    assert (again.datasets["shapes_caption"].vis_processor.eval.std, again.run.lr_layer_decay) == (IMAGENET[1], 0.75)
    assert again.run.lr_scale == {"visual_encoder": 0.1, "text_decoder.cls": 2.0, "text_decoder": 3.0}


@pytest.mark.parametrize("option", ["run.lr_scale.text_decoder=0", "run.lr_layer_decay=0", "run.lr_layer_decay=1.1"])
def test_rates_out_of_range(tmp_path: Path, option: str) -> None:
    (tmp_path / "run.yaml").write_text("model: {model_type: tiny}\ndatasets: {shapes_caption: {}}\n")
    with pytest.raises(UserError, match=option.partition("=")[0]):
        cli.load_config(Namespace(cfg_path=tmp_path / "run.yaml", options=[option], plugin=[]))


def test_statistics_of_timm_s_table() -> None:
    assert encoder_mean_std("vit_small_patch14_dinov2") == IMAGENET
    assert encoder_mean_std("base") == encoder_mean_std("vit_base_patch16_224") == ([0.5] * 3, [0.5] * 3)
    clip = encoder_mean_std("base", "timm/vit_base_patch16_clip_224.openai")
    assert clip is not None and clip[0] == [0.48145466, 0.4578275, 0.40821073]
    assert encoder_mean_std("base", "somebody/their_model") == ([0.5] * 3, [0.5] * 3)
    assert encoder_mean_std("no_model_of_timm") is None


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_name_of("Salesforce/blip-image-captioning-base") == "Salesforce/blip-image-captioning-base"
    assert hub_name_of("timm/vit_base_patch16_224.augreg_in21k") is not None
    paths = (True, None, "model.pth", "dir/model.pth", "./a", "~/a", "/tmp/a", "a/b/c", "https://host/file")
    assert [hub_name_of(path) for path in paths] == [None] * len(paths)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert hub_name_of("a/b") is None
