"""LAVIS's own run config, and what is refused in one line."""

from dataclasses import replace

import pytest

from blipds.config.run import load_run_config
from blipds.errors import UserError
from blipds.models import build_model
from blipds.models.protocol import keep_activations
from blipds.registry import ARCHS, PROCESSORS

# projects/blip2/train/caption_coco_ft.yaml
CAPTION_COCO_FT = """
model:
  arch: blip2_opt
  model_type: caption_coco_opt2.7b
  load_finetuned: False
  use_grad_checkpoint: True
  freeze_vit: False
datasets:
  coco_caption:
    vis_processor:
      train: {name: "blip2_image_train", image_size: 364}
      eval: {name: "blip_image_eval", image_size: 364}
    text_processor:
      train: {name: "blip_caption", prompt: "a photo of "}
      eval: {name: "blip_caption"}
run:
  task: captioning
  lr_sched: "linear_warmup_cosine_lr"
  init_lr: 1e-5
  min_lr: 0
  warmup_lr: 1e-8
  warmup_steps: 1000
  weight_decay: 0.05
  max_epoch: 5
  batch_size_train: 16
  batch_size_eval: 8
  num_workers: 4
  accum_grad_iters: 1
  max_len: 30
  min_len: 8
  num_beams: 5
  seed: 42
  output_dir: "output/BLIP2/Caption_coco_opt2.7b"
  amp: True
  resume_ckpt_path: null
  evaluate: False
  train_splits: ["train"]
  valid_splits: ["val"]
  test_splits: ["test"]
  device: "cuda"
  world_size: 1
  dist_url: "env://"
  distributed: True
"""


def test_laviss_own_config(tmp_path):
    path = tmp_path / "caption_coco_ft.yaml"
    path.write_text(CAPTION_COCO_FT)
    config, notices = load_run_config(path, ["model.vit_precision=fp32", "model.apply_lemmatizer=false"])
    model = config.model
    assert (model.image_size, model.opt_model, model.prompt) == (364, "facebook/opt-2.7b", "a photo of ")
    assert model.pretrained.endswith("blip2_pretrained_opt2.7b.pth") and model.recomputes
    assert sum(line.startswith(("model.vit_precision: ", "model.apply_lemmatizer: ")) for line in notices) == 2
    assert PROCESSORS["blip2_image_train"](image_size=364).draw_operations() == []
    model.check_precision("bf16")
    with pytest.raises(UserError, match=r"^fp16 in the DeepSpeed JSON, and an image encoder that learns"):
        model.check_precision("fp16")
    replace(model, freeze_vit=True).check_precision("fp16")


@pytest.mark.parametrize("name", sorted(ARCHS["blip2_opt"].model_types))
def test_model_types(name, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{arch: blip2_opt, model_type: {name}}}")
    config, _ = load_run_config(path)
    size = name.removeprefix("caption_coco_").removeprefix("pretrain_").replace("opt", "opt-")
    assert config.model.opt_model == f"facebook/{size}"
    assert config.model.freeze_vit == name.startswith("pretrain")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"qformer_kwargs": {"depth": 2}}, r"^model\.qformer_kwargs\.depth: unknown; allowed: hidden_size, "),
        ({"max_txt_len": 200}, r"^model\.max_txt_len is 200, but the language model has 120 positions behind the 8"),
        ({"opt_model": "/nowhere"}, r"^the language model '/nowhere': "),
    ],
)
def test_what_cannot_be_built(config, keys, message):
    with pytest.raises(UserError, match=message):
        build_model(replace(config.model, **keys), keep_activations)
