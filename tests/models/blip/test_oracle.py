"""This project's whole path (annotations, processors, tokenizer, collator, checkpoint, model, search) against the
original BLIP code's numbers."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from blipds.captioning.captioner import Captioner
from blipds.config.run import load_run_config
from blipds.data.datasets import Sample, build_dataset
from blipds.data.loader import Collator, EvalLoader
from blipds.data.processors import BlipImageEval, load_image
from blipds.data.tokenizer import CaptionTokenizer
from blipds.engine import parameter_groups
from blipds.models.generation import GenerationConfig

CPU = torch.device("cpu")
SETTINGS = {
    "beam3_max20_min5": GenerationConfig(),
    "greedy_max20_min5": GenerationConfig(num_beams=1),
    "beam5_max30_min10": GenerationConfig(num_beams=5, max_len=30, min_len=10),
    "beam3_max20_min5_rep1.5": GenerationConfig(repetition_penalty=1.5),
}


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer()


@pytest.fixture(scope="module")
def photographs(shared, tmp_path_factory):
    """The validation split; its samples are images with all their captions, evaluation transform."""
    run_config = tmp_path_factory.mktemp("oracle") / "run.yaml"
    run_config.write_text("""
        model: {image_size: 96}
        datasets:
          flickr8k_caption:
            captions_per_image: all
            vis_processor: {train: {name: blip_image_eval}}
            text_processor: {train: {name: blip_caption, max_words: 30}}
        run: {limit_train: 64}
    """)
    config, _ = load_run_config(run_config, [f"env.cache_root={shared / 'data'}"])
    return build_dataset("flickr8k_caption", config, "val", training=True)


@pytest.fixture(scope="module")
def oracle(shared):
    return load_file(shared / "oracle" / "forward.safetensors")


@pytest.fixture(scope="module")
def batch(photographs, tokenizer):
    """The first 16 photographs, the first caption of each."""
    samples = [photographs[index] for index in range(16)]
    first = [Sample(sample.image, sample.captions[:1]) for sample in samples]
    return Collator(tokenizer, photographs)(first)


@pytest.fixture(scope="module")
def inputs(batch):
    return batch.model_inputs(CPU, torch.float32)


def test_images_and_captions(photographs, golden):
    names = [record.image.path.name for record in photographs.records]
    assert names == golden["generate"]["images"]
    assert names[:16] == golden["forward"]["images"]
    assert [photographs[index].captions[0] for index in range(16)] == golden["forward"]["captions"]


def test_pixels_and_tokens(inputs, oracle, tokenizer):
    torch.testing.assert_close(inputs["pixel_values"][:4], oracle["pixel_values"], rtol=0, atol=1e-6)
    # all but the closing token, which is only ever predicted
    closing = (oracle["input_ids"] == tokenizer.eos_token_id) | (oracle["attention_mask"] == 0)
    assert torch.equal(inputs["input_ids"], oracle["input_ids"].masked_fill(closing, tokenizer.pad_token_id)[:, :-1])


@torch.no_grad()
def test_image_features_and_logits(oracle_model, inputs, oracle):
    image_embeds = oracle_model.visual_encoder(inputs["pixel_values"])
    torch.testing.assert_close(image_embeds[:4], oracle["image_embeds"], rtol=0, atol=1e-4)

    everywhere = torch.arange(oracle["input_ids"].numel())
    logits = oracle_model.text_decoder(oracle["input_ids"], image_embeds, label_positions=everywhere)
    logits = logits.view(*oracle["input_ids"].shape, -1)
    mask = oracle["attention_mask"].bool()
    torch.testing.assert_close(logits[:4, :, :2048][mask[:4]], oracle["logits"][mask[:4]], rtol=0, atol=1e-4)
    assert torch.equal(logits.argmax(-1)[mask], oracle["logits_argmax"][mask])


def test_loss(oracle_model, inputs, golden):
    loss = oracle_model(**inputs) / len(inputs["labels"])
    assert loss.item() == pytest.approx(golden["forward"]["loss"], abs=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_captions_word_for_word(oracle_model, photographs, tokenizer, golden, name):
    captioner = Captioner(tokenizer, SETTINGS[name], seed=0)
    loader = EvalLoader(photographs, range(len(photographs)), batch_size=32, num_workers=0)
    captions = []
    for batch in loader:
        images = batch.images.model_inputs(CPU, torch.float32)
        captions += [caption.text for caption in captioner.caption(oracle_model, images, batch.indices)]
    assert captions == golden["generate"]["captions"][name]


@pytest.mark.parametrize(("decay_on", "key"), [("all", "loss_decay_all"), ("matrices", "loss_decay_matrices_only")])
def test_eight_training_steps(build_oracle, tokenizer, golden, shared, decay_on, key):
    recipe = golden["train"]
    model = build_oracle().train()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe["weight_decay"], decay_on),
        lr=recipe["lr"],
        betas=tuple(recipe["betas"]),
        eps=recipe["eps"],
    )
    processor = BlipImageEval(96)
    collate = Collator(tokenizer, SimpleNamespace(image_processor=processor, features=None))
    losses = []
    for start in range(0, len(recipe["pairs"]), recipe["batch_size"]):
        pairs = recipe["pairs"][start : start + recipe["batch_size"]]
        images = [load_image(shared / "data" / "flickr8k" / "images" / name) for name, _ in pairs]
        samples = [Sample(processor(image), [text]) for image, (_, text) in zip(images, pairs, strict=True)]
        batch = collate(samples)
        loss = model(**batch.model_inputs(CPU, torch.float32)) / len(batch.captions.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(recipe[key], rel=1e-5)
