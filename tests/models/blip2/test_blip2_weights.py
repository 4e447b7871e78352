"""Weights in and out: LAVIS's partial .pth files, transformers' folders, and the way there and back."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Blip2Config, Blip2ForConditionalGeneration

from blipds.captioning.captioner import Captioner, caption_recipe, load_caption_model
from blipds.data.processors import CLIP_MEAN, CLIP_STD
from blipds.data.tokenizer import caption_tokenizer
from blipds.errors import UserError
from blipds.models.blip2.causal import text_logits
from blipds.models.blip2.export import export_lavis, export_transformers
from blipds.models.protocol import Export
from blipds.models.weights import load_weights, open_weights


def quiet(line):
    pass


@pytest.fixture(scope="module")
def lavis(shared):
    """LAVIS's file read by plain torch."""
    return torch.load(shared / "oracle_blip2" / "tiny_blip2_opt.pth", weights_only=True)["model"]


@pytest.fixture(scope="module")
def eva(lavis, tmp_path_factory):
    """The oracle's encoder as eva_vit_g.pth has one: a block more, norm and head, at 70 pixels."""
    prefix = "visual_encoder."
    encoder = {name.removeprefix(prefix): t for name, t in lavis.items() if name.startswith(prefix)}
    last = {name.replace("blocks.3.", "blocks.4."): t for name, t in encoder.items() if name.startswith("blocks.3.")}
    grid = torch.randn(1, 26, 96, generator=torch.Generator().manual_seed(0))
    more = {"norm.weight": torch.ones(96), "norm.bias": torch.ones(96), "head.weight": torch.ones(5, 96)}
    path = tmp_path_factory.mktemp("eva") / "eva_vit_g.pth"
    torch.save(encoder | last | more | {"pos_embed": grid}, path)
    return path


@pytest.fixture(scope="module")
def exporting(model, config):
    def exporting(out=model):
        tokenizer = caption_tokenizer(config.model).tokenizer
        tensors = {name: tensor.detach().clone() for name, tensor in out.named_parameters()}
        return Export(out, tensors, config.model, tokenizer, CLIP_MEAN, CLIP_STD, {"num_beams": 1}, "", False)

    return exporting


@pytest.fixture(scope="module")
def folder(exporting, tmp_path_factory):
    """The oracle's model as a transformers folder."""
    path = tmp_path_factory.mktemp("hf") / "captioner"
    export_transformers(path, exporting())
    return path


def same_weights(ours, expected, but=()):
    for (name, a), (other, b) in zip(ours.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b) or name in but, name


def test_only_what_was_trained(build, model, lavis, eva, tmp_path):
    """A pretrained file: encoder from EVA's file, language model from its folder."""
    trained = {n: t for n, t in lavis.items() if not n.startswith(("visual_encoder.", "opt_model."))}
    torch.save({"model": trained, "config": {}}, tmp_path / "pretrained.pth")
    found = build()
    torch.nn.init.zeros_(found.language_model.get_input_embeddings().weight)
    found.config.vit_pretrained = str(eva)
    load_weights(found, open_weights(str(tmp_path / "pretrained.pth"), tmp_path), quiet)
    same_weights(found, model, but=["visual_encoder.pos_embed"])
    assert found.visual_encoder.pos_embed.abs().max() > 0.5  # EVA's, another grid

    found.config.vit_pretrained = None
    with pytest.raises(UserError, match=r"pretrained.pth: holds no encoder, and model\.vit_pretrained names no file"):
        load_weights(found, open_weights(str(tmp_path / "pretrained.pth"), tmp_path), quiet)


def test_own_checkpoints_name_the_language_model(build, model, config, shared, tmp_path):
    """Saved without it; read from the file that it came from, or from where that has gone, if it is the same."""
    language = shared / "oracle_blip2" / "opt"
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(language, moved)
    found = build()
    load_weights(found, open_weights(str(moved), tmp_path), quiet, part="language model")
    named = found.constants()
    assert named["language_model_source"] == str(moved)
    saved = {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith(model.elsewhere)}
    path = tmp_path / "model.safetensors"
    save_file(saved, path, metadata={"format": "blipds", "config": json.dumps(named)})
    assert sum(t.numel() for t in saved.values()) == 714_568

    for gone in (False, True):
        torch.nn.init.zeros_(found.language_model.get_input_embeddings().weight)
        load_weights(found, open_weights(str(path), tmp_path), quiet)
        same_weights(found, model)
        assert found.constants() == named | {"language_model_source": str(language if gone else moved)}
        if not gone:
            moved.rename(other)

    weights = load_file(other / "model.safetensors")
    save_file(weights | {"model.decoder.final_layer_norm.bias": torch.ones(96)}, other / "model.safetensors")
    other.rename(moved)
    with pytest.raises(UserError, match=rf"was trained in front of {moved} as it was then; {moved} has other weights"):
        load_weights(found, open_weights(str(path), tmp_path), quiet)


def test_a_checkpoint_of_another_q_former(build, lavis, tmp_path):
    lavis = lavis | {"query_tokens": torch.zeros(1, 9, 64), "Qformer.bert.encoder.layer.4.extra": torch.zeros(1)}
    torch.save({"model": lavis}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"unexpected .*layer\.4\.extra; of another shape: bridge\.query_tokens"):
        load_weights(build(), open_weights(str(tmp_path / "other.pth"), tmp_path), quiet)


def test_lavis_to_transformers_and_back(model, lavis, folder, exporting, tmp_path):
    """Bit-equal all the way; caption_recipe finds the geometry in the folder."""
    recipe = caption_recipe(str(folder), None, [])
    back = load_caption_model(recipe, 1, torch.device("cpu"), "fp32", quiet)
    rows = "language_model.model.decoder.embed_tokens.weight"  # one more, for <image>
    for name, tensor in model.named_parameters():
        assert torch.equal(back.model.get_parameter(name)[: len(tensor)], tensor), name
    assert back.model.get_parameter(rows).shape[0] == 2001

    export_lavis(tmp_path / "back.pth", exporting(back.model))
    written = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    expected = {n: t for n, t in lavis.items() if not n.startswith("opt_model.") and "position_ids" not in n}
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


@torch.no_grad()
def test_transformers_computes_the_same(model, folder, tensors):
    theirs, info = Blip2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, mask = tensors["input_ids"][:4], tensors["attention_mask"][:4]
    images = torch.full((4, 8), theirs.config.image_token_index)
    given = {
        "input_ids": torch.cat([images, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(images), mask], 1),
    }
    logits = theirs.eval()(pixel_values=tensors["pixel_values"], **given).logits
    seen = given["attention_mask"].bool()
    torch.testing.assert_close(logits[..., :2000][seen], tensors["logits"][seen], rtol=0, atol=1e-4)


@torch.no_grad()
def test_transformers_captions_the_same(folder, golden, shared):
    """The call of the model card, greedy, and this project with the folder."""
    from PIL import Image

    theirs, processor = (
        Blip2ForConditionalGeneration.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    expected = golden["generate"]["captions"]["greedy_max30_min1"]
    for name, caption in list(zip(golden["generate"]["images"], expected, strict=True))[:8]:
        with Image.open(shared / "data" / "flickr8k" / "images" / name) as image:
            small = image.convert("RGB").resize((56, 56), Image.Resampling.BICUBIC)
        inputs = processor(images=small, text="a photo of", return_tensors="pt")
        ids = theirs.generate(**inputs, max_new_tokens=30, num_beams=1)
        words = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert processor.tokenizer.clean_up_tokenization(words) == caption


def test_what_transformers_wrote(folder, tmp_path):
    """Random weights, key biases among them, saved by transformers itself."""
    torch.manual_seed(0)
    theirs = Blip2ForConditionalGeneration(Blip2Config.from_pretrained(folder)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    for file in folder.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    recipe = caption_recipe(str(tmp_path), None, [])
    ours = load_caption_model(recipe, 1, torch.device("cpu"), "fp32", quiet).model
    pixels = torch.randn(2, 3, 56, 56)
    ids = torch.tensor([[2, 68, 268, 265, 500, 600]] * 2)
    places, images = torch.arange(6).expand(2, -1), torch.full((2, 8), theirs.config.image_token_index)
    with torch.no_grad():
        found = text_logits(ours.language_model, ours.bridge(ours.image_encoder(pixels)), ids, places, places * 0)
        everything = torch.cat([images, ids], 1)
        logits = theirs(pixel_values=pixels, input_ids=everything, attention_mask=torch.ones_like(everything)).logits
    torch.testing.assert_close(found, logits[:, 8:], rtol=0, atol=1e-4)
    assert isinstance(Captioner.from_config(recipe.config), Captioner) and recipe.config.run.min_len == 8

    stated = json.loads((tmp_path / "config.json").read_text())
    stated["qformer_config"]["num_attention_heads"] = 2
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(UserError, match=r"qformer_config.num_attention_heads is 2 in the checkpoint, 4 in the model"):
        load_weights(ours, open_weights(str(tmp_path), tmp_path), quiet)
