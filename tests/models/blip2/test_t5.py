"""T5 as the language model, held against transformers' own use of it; weights in and out."""

import json
from dataclasses import replace
from functools import partial

import blip2_oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, Blip2Config, Blip2ForConditionalGeneration

from blipds.captioning.captioner import Captioner, caption_recipe, load_caption_model
from blipds.config.run import load_run_config
from blipds.data.caption_rows import caption_rows
from blipds.data.processors import CLIP_MEAN, CLIP_STD
from blipds.data.tokenizer import caption_tokenizer
from blipds.errors import UserError
from blipds.models import build_model
from blipds.models.blip2.checkpoints import to_lavis
from blipds.models.blip2.export import export_lavis, export_transformers
from blipds.models.blip2.t5 import CachedT5
from blipds.models.initialisation import initialise
from blipds.models.parameters import copy_into
from blipds.models.protocol import Export, keep_activations
from blipds.models.weights import load_initial_weights, load_weights, open_weights

CPU = torch.device("cpu")
TEXTS = [
    ["a dog runs", "a black dog is running after a white dog in the snow", "two dogs", "snow", "dogs play outside"],
    ["a man in a red shirt", "a person sits on a bench"],
    [],
    ["a girl jumps into a pool"],
]


def quiet(line):
    pass


def build(config, checkpoint_fn=keep_activations):
    """The small model with random weights but for the language model's, in evaluation mode."""
    model = build_model(config.model, checkpoint_fn)
    load_initial_weights(model, config, quiet)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.bridge.query_tokens)
    torch.nn.init.normal_(model.bridge.projection.weight)
    return model.eval()


@pytest.fixture(scope="module")
def config(t5_run_config):
    return load_run_config(t5_run_config)[0]


@pytest.fixture(scope="module")
def model(config):
    return build(config)


@pytest.fixture(scope="module")
def tokenizer(config):
    return caption_tokenizer(config.model)


@pytest.fixture(scope="module")
def exporting(config, tokenizer):
    def exporting(model):
        tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        generation = {"num_beams": 1}
        return Export(model, tensors, config.model, tokenizer.tokenizer, CLIP_MEAN, CLIP_STD, generation, "", False)

    return exporting


@pytest.fixture(scope="module")
def folder(model, exporting, tmp_path_factory):
    """The model as a transformers folder."""
    path = tmp_path_factory.mktemp("hf") / "captioner"
    export_transformers(path, exporting(model))
    return path


def their_logits(theirs, pixel_values, prompt_ids, words):
    """What transformers says behind each of words (I, T), which begin with the padding token."""
    images = torch.full((len(words), 8), theirs.config.image_token_index)
    ids = torch.cat([images, torch.tensor(prompt_ids).expand(len(words), -1)], 1)
    return theirs(pixel_values=pixel_values, input_ids=ids, decoder_input_ids=words).logits


def test_texts_as_lavis_tokenizes_them(tokenizer, model):
    """Both ends of its T5: `t5_tokenizer(text, truncation=True, max_length=32)`."""
    lavis = tokenizer.tokenizer
    assert model.prompt_ids.tolist() == lavis("a photo of")["input_ids"]
    for text in ("a dog runs", " ".join(["dogs"] * 40)):
        expected = lavis(text, truncation=True, max_length=32)["input_ids"]
        assert tokenizer.encode(f"a photo of {text}") == [lavis.pad_token_id, *expected]
    assert tokenizer.decode([0, *lavis("a dog, two dogs.")["input_ids"]]) == "a dog, two dogs."
    assert tokenizer.longest(30) == 31  # behind the padding token


@pytest.mark.parametrize("kind", blip2_oracle.T5_KINDS)
@torch.no_grad()
def test_it_computes_what_transformers_does(kind, config, shared, tmp_path):
    made = blip2_oracle.write_t5(shared, tmp_path / kind, kind)
    ours = build(replace(config, model=replace(config.model, llm=str(tmp_path / kind))))
    queries = torch.randn(2, 8, 64)
    words = torch.randint(2, 100, (2, 2, 5))
    row = torch.cat([torch.zeros(2, 1, dtype=torch.long), words.flatten(1)], 1)
    places = torch.tensor([0, *range(1, 6), *range(1, 6)]).expand(2, -1)
    segments = torch.tensor([0] + [1] * 5 + [2] * 5).expand(2, -1)
    logits = ours.logits(queries, row, places, segments)
    prompt = made.get_input_embeddings()(ours.prompt_ids).expand(2, -1, -1)
    embeds = torch.cat([queries, prompt], 1)
    for caption in range(2):
        alone = torch.cat([torch.zeros(2, 1, dtype=torch.long), words[:, caption]], 1)
        expected = made(inputs_embeds=embeds, decoder_input_ids=alone).logits
        torch.testing.assert_close(logits[:, :1], expected[:, :1], rtol=0, atol=1e-4)
        torch.testing.assert_close(logits[:, 1 + 5 * caption : 6 + 5 * caption], expected[:, 1:], rtol=0, atol=1e-4)


@torch.no_grad()
def test_beams_share_a_row_of_the_cache(model):
    """Three beams of two images, reordered, then one image alone: each as its own words from the start."""
    context = model.context(torch.randn(2, 8, 64))
    decoder = CachedT5(model.language_model, context)
    start = torch.zeros(1, dtype=torch.long)
    decoder.start(start, 3)
    said = torch.zeros(2, 3, 1, dtype=torch.long)
    for step in range(5):
        parents = torch.tensor([[2, 0, 0], [1, 1, 2]])[: len(said)]
        decoder.reorder(parents)
        tokens = torch.randint(2, 100, (len(said), 3))
        said = torch.cat([said.gather(1, parents.unsqueeze(-1).expand_as(said)), tokens.unsqueeze(-1)], -1)
        logits = decoder.step(tokens)
        for image, beam in torch.cartesian_prod(torch.arange(len(said)), torch.arange(3)).tolist():
            alone = model.language_model(
                encoder_outputs=(context[[image]],), decoder_input_ids=said[image, beam].unsqueeze(0)
            ).logits[0, -1]
            torch.testing.assert_close(logits[image, beam], alone, rtol=0, atol=1e-4)
        if step == 2:
            keep = torch.tensor([1])
            decoder.keep(keep)
            said, context = said[keep], context[keep]


@torch.no_grad()
def test_transformers_captions_the_same(model, config, folder):
    theirs, info = Blip2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    theirs.eval()
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    words = torch.tensor([[0, 120, 130, 140, 7]] * 4)
    places = torch.arange(5).expand(4, -1)
    found = model.logits(model.bridge(model.image_encoder(pixels)), words, places, places * 0)
    expected = their_logits(theirs, pixels, model.prompt_ids.tolist(), words)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    processor = AutoProcessor.from_pretrained(folder)
    greedy = replace(config, run=replace(config.run, num_beams=1, min_len=1))
    found = Captioner.from_config(greedy).caption(model, {"pixel_values": pixels}, range(4))
    captions = [caption.text for caption in found]
    inputs = processor(images=torch.zeros(3, 56, 56), text="a photo of", return_tensors="pt")
    for image, caption in enumerate(captions):
        ids = theirs.generate(**inputs | {"pixel_values": pixels[[image]]}, max_new_tokens=30, num_beams=1)
        assert processor.decode(ids[0], skip_special_tokens=True).strip() == caption
    assert len(set(captions)) == 4


def test_there_and_back(model, exporting, folder, tmp_path):
    """Here, transformers, here, LAVIS (without the language model), here: bit-equal all the way."""
    recipe = caption_recipe(str(folder), None, [])
    assert recipe.config.model.arch == "blip2_t5" and recipe.config.run.min_len == 8
    back = load_caption_model(recipe, 1, CPU, "fp32", quiet).model
    assert not torch.equal(back.language_model.lm_head.weight, back.language_model.shared.weight)
    assert back.language_model.config.dense_act_fn == "gelu_new"  # as the folder says
    for name, tensor in model.named_parameters():
        assert torch.equal(back.get_parameter(name), tensor), name

    export_lavis(tmp_path / "lavis.pth", exporting(back))
    written = torch.load(tmp_path / "lavis.pth", weights_only=True)["model"]
    assert {name.partition(".")[0] for name in written} == {
        *("visual_encoder", "ln_vision", "Qformer", "query_tokens", "t5_proj")
    }
    again = caption_recipe(str(tmp_path / "lavis.pth"), None, [])
    last = load_caption_model(again, 1, CPU, "fp32", quiet).model
    for name, tensor in model.named_parameters():
        assert torch.equal(last.get_parameter(name), tensor), name


def test_another_prompt_reaches_the_encoder(folder):
    recipe = caption_recipe(str(folder), None, []).with_decoding(prompt="a dog ")
    found = load_caption_model(recipe, 1, CPU, "fp32", quiet)
    assert found.model.prompt_ids.tolist() == found.captioner.tokenizer.tokenizer("a dog")["input_ids"]


@torch.no_grad()
def test_what_transformers_wrote(folder, tmp_path):
    """Random weights, words in and out saved as one."""
    torch.manual_seed(0)
    theirs = Blip2ForConditionalGeneration(Blip2Config.from_pretrained(folder)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    for file in folder.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    ours = load_caption_model(caption_recipe(str(tmp_path), None, []), 1, CPU, "fp32", quiet).model
    pixels, words, places = torch.randn(2, 3, 56, 56), torch.tensor([[0, 30, 40]] * 2), torch.arange(3).expand(2, -1)
    found = ours.logits(ours.bridge(ours.image_encoder(pixels)), words, places, places * 0)
    expected = their_logits(theirs, pixels, ours.prompt_ids.tolist(), words)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_own_checkpoints_name_the_language_model(model, config, tmp_path):
    saved = {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith(model.elsewhere)}
    assert {name.partition(".")[0] for name in saved} == {"visual_encoder", "bridge"}
    path = tmp_path / "model.safetensors"
    save_file(saved, path, metadata={"format": "blipds", "config": json.dumps(model.constants())})
    found = build_model(config.model, keep_activations)
    load_weights(found, open_weights(str(path), tmp_path), quiet)
    for name, tensor in model.named_parameters():
        assert torch.equal(found.get_parameter(name), tensor), name
    assert found.constants() == model.constants()


def gradients(model, captions, tokenizer, pixel_values):
    rows = caption_rows(captions, tokenizer.prompt_ids, tokenizer.pad_token_id)
    loss = model(**rows.to(CPU), pixel_values=pixel_values)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def test_shared_captions_equal_separate_pairs(config, tokenizer):
    """With activation checkpointing where they share, without where they do not."""
    recomputing = replace(config, model=replace(config.model, use_grad_checkpoint=True))
    model = build(recomputing, partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)).train()
    captions = [[tokenizer.encode(tokenizer.prompt + text) for text in row] for row in TEXTS]
    pixel_values = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    shared_loss, shared = gradients(model, captions, tokenizer, pixel_values)
    pairs = [(image, [caption]) for image, row in enumerate(captions) for caption in row]
    pixels_of_pairs = pixel_values[[image for image, _ in pairs]]
    pair_loss, separate = gradients(build(config).train(), [row for _, row in pairs], tokenizer, pixels_of_pairs)
    torch.testing.assert_close(shared_loss, pair_loss, rtol=1e-5, atol=0)
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert shared.keys() == separate.keys() == learns
    assert {name.partition(".")[0] for name in learns} == {"visual_encoder", "bridge"}
    for name, gradient in separate.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item() + 1e-6)


def test_label_weights(model, tokenizer):
    """The loss is the weighted sum of -log p, each of them transformers' own."""
    caption = tokenizer.encode("a photo of two dogs play")
    rows = caption_rows([[caption]], tokenizer.prompt_ids, tokenizer.pad_token_id).to(CPU)
    pixels, weights = torch.randn(1, 3, 56, 56), torch.linspace(-1, 2, len(caption) - 1)
    with torch.no_grad():
        context = model.context(model.bridge(model.image_encoder(pixels)))
        ids = torch.tensor([caption])
        logits = model.language_model(encoder_outputs=(context,), decoder_input_ids=ids[:, :-1]).logits
        log_p = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten()
        found = model(**rows, pixel_values=pixels, label_weights=weights)
        torch.testing.assert_close(found, -(weights * log_p).sum(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(**rows, pixel_values=pixels), -log_p.sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["caption_coco_flant5xl", "pretrain_flant5xl", "pretrain_flant5xxl"])
def test_model_types(name, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{arch: blip2_t5, model_type: {name}, vit_precision: fp16}}")
    model = load_run_config(path)[0].model
    assert model.t5_model == f"google/flan-t5-{name.rpartition('flant5')[2]}"
    assert model.freeze_vit == name.startswith("pretrain") and model.pretrained.endswith(".pth")
    with pytest.raises(UserError, match=r"^fp16 in the DeepSpeed JSON: T5's numbers overflow"):
        model.check_precision("fp16")


def test_laviss_activation_and_other_language_models(config, shared):
    t5 = replace(config.model, llm=None, t5_model=config.model.llm)
    assert build_model(t5, keep_activations).language_model.config.dense_act_fn == "gelu"
    with pytest.raises(UserError, match=r"^the language model '.*/opt' is a opt; allowed: t5, mt5$"):
        build_model(replace(config.model, llm=str(shared / "oracle_blip2" / "opt")), keep_activations)


def test_clip_as_the_encoder(config, tmp_path):
    """LAVIS's `clip_L` (lavis/models/clip_vit.py), whose file has a block more than BLIP-2 takes."""
    path = tmp_path / "run.yaml"
    path.write_text("model: {arch: blip2_t5, model_type: pretrain_flant5xl_vitL}")
    packaged = load_run_config(path)[0].model
    assert packaged.vit_model == "clip_L" and packaged.vit_pretrained.endswith("clip_vit_L.pth")
    sizes = {"embed_dim": 32, "num_heads": 2, "depth": 2}
    section = replace(config.model, vit_model="clip_L", vit_kwargs=sizes)
    model = build_model(section, keep_activations)
    initialise(model, 0, partial(copy_into, model))
    block = {
        **{f"ln_{k}.{end}": (32,) for k in (1, 2) for end in ("weight", "bias")},
        **{"attn.in_proj_weight": (96, 32), "attn.in_proj_bias": (96,)},
        **{"attn.out_proj.weight": (32, 32), "attn.out_proj.bias": (32,)},
        **{"mlp.c_fc.weight": (128, 32), "mlp.c_fc.bias": (128,)},
        **{"mlp.c_proj.weight": (32, 128), "mlp.c_proj.bias": (32,)},
    }
    shapes = {
        **{"class_embedding": (32,), "positional_embedding": (17, 32), "conv1.weight": (32, 3, 14, 14)},
        **{"ln_pre.weight": (32,), "ln_pre.bias": (32,)},
        **{f"transformer.resblocks.{n}.{name}": shape for n in range(3) for name, shape in block.items()},
    }
    clip = {name: torch.randn(shape) for name, shape in shapes.items()}
    torch.save(clip, tmp_path / "clip_vit_L.pth")
    load_weights(model, open_weights(str(tmp_path / "clip_vit_L.pth"), tmp_path), quiet, part="image encoder")
    written = to_lavis(dict(model.named_parameters()), "t5")
    ours = {n.removeprefix("visual_encoder."): t for n, t in written.items() if n.startswith("visual_encoder.")}
    assert ours.keys() == {name for name in clip if ".2." not in name}
    assert all(torch.equal(tensor, clip[name]) for name, tensor in ours.items())


def test_the_tokenizer_is_found(config):
    assert len(caption_tokenizer(config.model)) == len(AutoTokenizer.from_pretrained(config.model.llm))
    with pytest.raises(UserError, match=r"^model\.tokenizer '/nowhere': "):
        build_model(replace(config.model, tokenizer="/nowhere"), keep_activations)
