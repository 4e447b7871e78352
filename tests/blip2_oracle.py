"""The small BLIP-2 of ../shared/oracle_blip2 as a run config, and one with a small T5 of random weights."""

import json

import torch
from PIL import Image
from transformers import AutoModelForSeq2SeqLM, MT5Config, T5Config, T5Tokenizer

MODEL = """
model:
  arch: blip2_opt
  model_type: caption_coco_opt2.7b
  load_pretrained: false
  finetuned: {shared}/oracle_blip2/tiny_blip2_opt.pth
  vit_pretrained: null
  vit_kwargs: {{embed_dim: 96, depth: 4, num_heads: 4}}
  vit_precision: fp32
  image_size: 56
  num_query_token: 8
  qformer_kwargs:
    hidden_size: 64
    num_hidden_layers: 4
    num_attention_heads: 4
    intermediate_size: 128
    hidden_dropout_prob: 0.0
    attention_probs_dropout_prob: 0.0
  opt_model: {shared}/oracle_blip2/opt
  prompt: a photo of
"""
REST = """
datasets:
  custom_caption:
    build_info: {{annotations: {{train: {{storage: {folder}/train.json}}, val: {{storage: {folder}/val.json}}}}}}
    images: {folder}
    vis_processor: {{train: {{name: blip_image_eval}}}}
    text_processor: {{train: {{name: blip_caption, prompt: "a photo of "}}}}
run:
  lr_sched: constant_lr
  init_lr: 1.0e-4
  weight_decay: 0.05
  batch_size_train: 8
  shuffle: false
  num_workers: 0
  valid_splits: []
  num_beams: 5
  max_len: 30
  min_len: 8
"""


def golden(shared):
    return json.loads((shared / "oracle_blip2" / "golden.json").read_text())


T5_SIZES = {"d_model": 64, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
T5_KINDS = {
    "t5": (T5Config, {"feed_forward_proj": "relu"}),
    "flan-t5": (T5Config, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": (MT5Config, {}),
}


def write_t5(shared, folder, kind="flan-t5"):
    """A T5 of random weights with a tokenizer of the oracle's words, as a transformers folder; the model of it."""
    words = sorted({word for _, caption in golden(shared)["train"]["pairs"] for word in caption.lower().split()})
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("▁", -9.0), *((letter, -9.0) for letter in letters), *((f"▁{w}", -1.0) for w in ["photo", "of", *words])]
    vocabulary = dict([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces])
    tokenizer = T5Tokenizer(vocab=list(vocabulary.items()), extra_ids=0)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config, keys = T5_KINDS[kind]
    stated = config(vocab_size=len(vocabulary) + 20, decoder_start_token_id=0, **T5_SIZES, **keys)
    model = AutoModelForSeq2SeqLM.from_config(stated).eval()
    if kind != "t5":  # words out of their own; transformers ties all T5s that it makes
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
        model.all_tied_weights_keys.pop("lm_head.weight")
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if "layer_norm" in name or "bias" in name else 0.15)
    model.save_pretrained(folder)
    return model


def write_t5_config(shared, folder):
    """The run config of `write_config` in `folder` with the T5 in `folder`/t5, and random weights but for that."""
    text = (folder / "run.yaml").read_text().replace("blip2_opt", "blip2_t5").replace("opt2.7b", "flant5xl")
    text = text.replace("  load_pretrained: false", "  load_pretrained: false\n  load_finetuned: false")
    path = folder / "t5.yaml"
    path.write_text(text.replace(f"opt_model: {shared}/oracle_blip2/opt", f"llm: {folder}/t5"))
    return path


def write_config(shared, folder):
    """A run config of the oracle's training pairs, in order, and of the images that it captions (split val).

    The images are resized as the oracle's were: whole photographs would be read at a fraction of their size.
    """
    expected = golden(shared)
    for name in {image for image, _ in expected["train"]["pairs"]} | set(expected["generate"]["images"]):
        with Image.open(shared / "data" / "flickr8k" / "images" / name) as image:
            image.convert("RGB").resize((56, 56), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    pairs = [
        {"image": f"{image}.png", "caption": caption, "image_id": number}
        for number, (image, caption) in enumerate(expected["train"]["pairs"])
    ]
    (folder / "train.json").write_text(json.dumps(pairs))
    captions = dict(zip(expected["forward"]["images"], expected["forward"]["captions"], strict=True))
    images = [
        {"image": f"{image}.png", "caption": [captions.get(image, "none")], "image_id": number}
        for number, image in enumerate(expected["generate"]["images"])
    ]
    (folder / "val.json").write_text(json.dumps(images))
    path = folder / "run.yaml"
    path.write_text((MODEL + REST).format(shared=shared, folder=folder))
    return path
