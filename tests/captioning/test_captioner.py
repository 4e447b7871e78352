"""What a captioner asks of its model before the first image."""

import pytest
import torch

from blipds.captioning.captioner import Captioner
from blipds.config.sections import Config
from blipds.errors import UserError
from blipds.models import build_model
from blipds.models.blip.config import BlipConfig
from blipds.models.protocol import keep_activations

TINY = {
    "vit_kwargs": {"embed_dim": 8, "depth": 1, "num_heads": 1, "patch_size": 8},
    "image_size": 16,
    "med_config_path": "configs/models/med_config_tiny.json",  # 64 positions, 30,524 words
}


@pytest.fixture(scope="module")
def model():
    return build_model(BlipConfig(**TINY), keep_activations)


def captioner(**run):
    config = Config(model=BlipConfig(**TINY))
    for key, value in run.items():
        setattr(config.run, key, value)
    return Captioner.from_config(config)


def test_captions_that_the_positions_hold(model):
    captioner(max_len=64).check_model(model)
    with pytest.raises(UserError, match=r"^run\.max_len is 65, but the text decoder has 64 positions$"):
        captioner(max_len=65).check_model(model)


def test_more_beams_than_words(model):
    captioner(num_beams=15_262).check_model(model)
    with pytest.raises(
        UserError, match=r"^run\.num_beams is 15263, more than half of the vocabulary \(30,524 tokens\)$"
    ):
        captioner(num_beams=15_263).check_model(model)


def test_a_tokenizer_with_more_tokens_than_embeddings(model, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", *(f"w{i}" for i in range(31_000))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = Config(model=BlipConfig(**TINY, tokenizer=str(tmp_path / "vocab.txt")))
    with pytest.raises(UserError, match=r"^model\.tokenizer knows 31,010 tokens, but .* embeddings for 30,524$"):
        Captioner.from_config(config).check_model(model)


@pytest.mark.parametrize(("size", "nearest"), [(111, "96 and 112"), (390, "384 and 400"), (7, "16")])
def test_an_image_size_that_patches_do_not_divide(size, nearest):
    message = rf"model\.image_size is {size}, no multiple of .* patches of 16 pixels; the nearest sizes are {nearest}$"
    with pytest.raises(UserError, match=message):
        build_model(BlipConfig(image_size=size), keep_activations)


def test_a_gpu_that_is_too_small_is_one_line(model, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 4 GiB of which none is")

    monkeypatch.setattr(model, "generate", full)
    message = (
        r"^GPU memory is used up \(CUDA .* GPU 0 has 4 GiB\): 1 images at once .* run.batch_size_eval, or --batch-"
    )
    with pytest.raises(UserError, match=message):
        captioner().caption(model, {"image_embeds": torch.zeros(1, 5, 8)}, ["image"])
