"""The small BLIP-2 of ../shared/oracle_blip2 as a run config."""

import json

from PIL import Image

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
