"""This project's whole path (annotations, processors, tokenizer, collator, checkpoint, model, search) against the
numbers of LAVIS's BLIP-2 code."""

import pytest
import torch

from blipds.captioning.captioner import Captioner
from blipds.config.run import load_run_config
from blipds.data.datasets import build_dataset
from blipds.data.loader import Collator, EvalLoader
from blipds.data.tokenizer import caption_tokenizer
from blipds.engine import parameter_groups
from blipds.models.blip2.causal import text_logits

CPU = torch.device("cpu")
SETTINGS = {
    "beam5_max30_min8": [],
    "greedy_max30_min1": ["run.num_beams=1", "run.min_len=1"],
    "beam5_lp0_rep1.15": ["run.length_penalty=0.0", "run.repetition_penalty=1.15"],
    "beam3_max12_lp-1": ["run.num_beams=3", "run.max_len=12", "run.min_len=1", "run.length_penalty=-1.0"],
}


@pytest.fixture(scope="module")
def photographs(config):
    return build_dataset("custom_caption", config, "val", training=False)


@pytest.fixture(scope="module")
def inputs(config):
    """The first 16 photographs with their captions, as the loop feeds the model."""
    dataset = build_dataset("custom_caption", config, "val", training=True)
    batch = Collator(caption_tokenizer(config.model), dataset)([dataset[index] for index in range(16)])
    return batch.model_inputs(CPU, torch.float32)


def test_pixels_and_tokens(inputs, tensors):
    torch.testing.assert_close(inputs["pixel_values"][:4], tensors["pixel_values"], rtol=0, atol=1e-6)
    # all but the closing token, which is only ever predicted
    closing = (tensors["input_ids"] == 202) | (tensors["attention_mask"] == 0)
    assert torch.equal(inputs["input_ids"], tensors["input_ids"].masked_fill(closing, 1)[:, :-1])
    assert torch.equal(inputs["labels"], tensors["labels"][tensors["labels"] != -100])


@torch.no_grad()
def test_features_queries_and_logits(model, inputs, tensors):
    image_embeds = model.image_encoder(inputs["pixel_values"][:4])
    normed = model.bridge.ln_vision(image_embeds)
    torch.testing.assert_close(normed, tensors["image_embeds"], rtol=0, atol=1e-4)
    queries = model.bridge(image_embeds)
    torch.testing.assert_close(queries, tensors["projected"], rtol=0, atol=1e-4)

    rows = {name: inputs[name][:4] for name in ("input_ids", "position_ids", "segment_ids")}
    logits = text_logits(model.language_model, queries, **rows)
    mask = tensors["attention_mask"][:4, 1:].bool()  # the closing token's logits are of no use
    expected = tensors["logits"][:, 8:-1]
    torch.testing.assert_close(logits[mask], expected[mask], rtol=0, atol=1e-4)


def test_the_query_outputs(model, inputs, tensors):
    found = []
    with torch.no_grad():
        handle = model.bridge.projection.register_forward_pre_hook(lambda module, given: found.append(given[0]))
        model.bridge(model.image_encoder(inputs["pixel_values"][:4]))
        handle.remove()
    torch.testing.assert_close(found[0], tensors["queries"], rtol=0, atol=1e-4)


@torch.no_grad()
def test_loss(model, inputs, golden):
    loss = model(**inputs) / len(inputs["labels"])
    assert loss.item() == pytest.approx(golden["forward"]["loss"], abs=1e-5)
    weights = torch.linspace(-1, 2, len(inputs["labels"]))
    each = [model(**inputs, label_weights=row).item() for row in torch.eye(len(weights))[:5]]
    weighted = model(**inputs, label_weights=torch.cat([weights[:5], torch.zeros(len(weights) - 5)])).item()
    assert weighted == pytest.approx(sum(w * one for w, one in zip(weights.tolist(), each, strict=False)), abs=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_captions_word_for_word(model, photographs, run_config, golden, name):
    captioner = Captioner.from_config(load_run_config(run_config, SETTINGS[name])[0])
    captioner.check_model(model)
    captions = []
    for batch in EvalLoader(photographs, range(len(photographs)), batch_size=32, num_workers=0):
        images = batch.images.model_inputs(CPU, torch.float32)
        captions += [caption.text for caption in captioner.caption(model, images, batch.indices)]
    assert captions == golden["generate"]["captions"][name]


@pytest.mark.parametrize("frozen", [False, True])
def test_eight_training_steps(build, config, golden, frozen):
    """In place of ZeRO: torch's AdamW; with activation checkpointing where the encoder learns."""
    recipe = golden["train"]
    model = build(lambda *call: torch.utils.checkpoint.checkpoint(*call, use_reentrant=False), use_grad_checkpoint=True)
    if frozen:
        model.freeze_image_encoder()
    model.train()
    assert not any(parameter.requires_grad for parameter in model.language_model.parameters())
    groups = parameter_groups(model, recipe["weight_decay"], "matrices")
    optimizer = torch.optim.AdamW(groups, lr=recipe["lr"], betas=tuple(recipe["betas"]), eps=recipe["eps"])
    dataset = build_dataset("custom_caption", config, "train", training=True)
    collate = Collator(caption_tokenizer(config.model), dataset)
    losses = []
    for start in range(0, 64, recipe["batch_size"]):
        inputs = collate([dataset[start + k] for k in range(8)]).model_inputs(CPU, torch.float32)
        loss = model(**inputs) / len(inputs["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(recipe["loss_vit_frozen" if frozen else "loss_vit_trains"], rel=1e-4)
