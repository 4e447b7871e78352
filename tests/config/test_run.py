"""The run config: what wins over what, what LAVIS's configs need, and the one line that a mistake gets."""

import json
import re
from pathlib import Path

import pytest

import blipds.data  # noqa: F401  (registers datasets and processors)
from blipds.config.run import PACKAGED_DATASETS, REPLACED_RUN_KEYS, load_run_config
from blipds.config.sections import AnnotationConfig
from blipds.errors import UserError
from blipds.models.blip.config import CONFIGS, read_text_config
from blipds.registry import DATASETS, PROCESSORS

ROOT = Path(__file__).resolve().parents[2]

# LAVIS, projects/blip/train/caption_coco_large_ft.yaml, with the keys that reference.md lists
CAPTION_COCO_LARGE_FT = """
model:
  arch: blip_caption
  model_type: large_coco
  load_finetuned: False

datasets:
  coco_caption: # name of the dataset builder
    vis_processor:
        train:
          name: "blip_image_train"
        eval:
          name: "blip_image_eval"
    text_processor:
        train:
          name: "blip_caption"
          prompt: "a picture of "
        eval:
          name: "blip_caption"

run:
  task: captioning
  # optimizer
  lr_sched: "linear_warmup_cosine_lr"
  init_lr: 2e-6
  min_lr: 0
  weight_decay: 0.05
  max_epoch: 5
  batch_size_train: 16
  batch_size_eval: 64
  num_workers: 4

  max_len: 20
  min_len: 5
  num_beams: 3

  seed: 42
  output_dir: "output/BLIP/Caption_coco_large_ft"

  amp: False
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


@pytest.fixture
def load(tmp_path):
    """load(YAML text, *options) gives the config."""

    def load(text, *options):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_run_config(path, options)[0]

    return load


def fails(load, text, *options):
    """The message of the error, which is one line."""
    with pytest.raises(UserError) as caught:
        load(text, *options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- precedence ---


def test_precedence(load):
    text = """
    model: {model_type: tiny, max_txt_len: 30, prompt: "a photo of "}
    datasets: {shapes_caption: {num_images: {val: 50, test: 60}}}
    run: {seed: 1, max_epoch: 3}
    """
    config = load(text, "model.prompt='an image of '", "datasets.shapes_caption.num_images.test=7", "run.max_epoch=4")

    # dataclass < packaged model < run config < --options
    assert config.model.label_smoothing == 0.1
    assert config.model.image_size == 64
    assert config.model.vit_kwargs == {"embed_dim": 128, "depth": 4, "num_heads": 4, "patch_size": 8}
    assert config.model.max_txt_len == 30
    assert config.model.prompt == "an image of "
    # dataclass < packaged dataset < run config < --options
    assert config.datasets["shapes_caption"].captions_per_image == 1
    assert config.datasets["shapes_caption"].num_images == {"train": 6000, "val": 50, "test": 7}
    # the packaged blip_image_eval over the dataclass's blip_image_train: shapes must not be flipped
    assert config.datasets["shapes_caption"].vis_processor.train.name == "blip_image_eval"
    assert (config.run.init_lr, config.run.seed, config.run.max_epoch) == (1e-5, 1, 4)


def test_options_choose_the_packaged_model(load):
    config = load("model: {model_type: tiny}", "model.model_type=base_coco")
    assert (config.model.image_size, config.model.vit_kwargs) == (384, {})


def test_options_reach_into_open_dictionaries(load):
    config = load("model: {model_type: tiny}", "model.vit_kwargs.depth=2")
    assert config.model.vit_kwargs == {"embed_dim": 128, "depth": 2, "num_heads": 4, "patch_size": 8}


@pytest.mark.parametrize("text", ["4711_1", "12:30:00", "0012", "1e5", "yes", "2026-11-26", "0x1F", "~job", "a: b"])
def test_text_keeps_its_characters(load, text):
    text_or_quoted = f"'{text}'" if ": " in text else text
    section = f"datasets: {{custom_caption: {{build_info: {{annotations: {{1_0: {text_or_quoted}}}}}}}}}"
    config = load(f"{section}\nrun: {{job_id: {text_or_quoted}, valid_splits: [{text_or_quoted}]}}")
    assert (config.run.job_id, config.run.valid_splits) == (text, [text])
    assert {
        split: part.storage for split, part in config.datasets["custom_caption"].build_info.annotations.items()
    } == {"1_0": [text]}

    build_info = "datasets.custom_caption.build_info"
    options = (
        *(f"run.job_id={text_or_quoted}", f"run.test_splits=[{text_or_quoted}]", f"run.train_splits={text_or_quoted}"),
        *(f"{build_info}.annotations.train={text_or_quoted}", f"{build_info}.images.storage={text_or_quoted}"),
    )
    config = load("model: {model_type: tiny}", *options)
    assert (config.run.job_id, config.run.test_splits, config.run.train_splits) == (text, [text], [text])
    info = config.datasets["custom_caption"].build_info
    assert (info.annotations["train"].storage, info.images.storage) == ([text], text)


def test_what_is_no_text_stays_what_yaml_says(load):
    text = "model: {freeze_vit: yes, cache_image_embeds: true, tokenizer: null}\nrun: {<<: &b {job_id: 1_1, seed: 1_1}}"
    config = load(text, "run.init_lr=1e-3", "run.output_dir='0012'", "run.annotation_file=null", "run.job_id=")
    assert (config.model.freeze_vit, config.model.cache_image_embeds, config.model.tokenizer) == (True, True, None)
    assert (config.run.seed, config.run.init_lr, config.run.output_dir) == (11, 1e-3, "0012")
    assert (config.run.annotation_file, config.run.job_id) == (None, None)


def test_options_that_the_locale_cannot_read(load):
    line = fails(load, "model: {model_type: tiny}", "model.prompt='ein bild f\udcc3\udcbcr '")
    assert line.endswith("not text in this locale; set LC_ALL=C.UTF-8")


def test_an_empty_config_is_all_defaults(load):
    for text in ("", "model:\nrun:\nenv:\n"):
        config = load(text)
        assert (config.model.arch, config.model.model_type) == ("blip_caption", "base_coco")
        assert config.datasets == {}


# --- what LAVIS writes ---


def test_lavis_config(tmp_path):
    path = tmp_path / "caption_coco_large_ft.yaml"
    path.write_text(CAPTION_COCO_LARGE_FT)
    config, notices = load_run_config(path)

    model, coco, run = config.model, config.datasets["coco_caption"], config.run
    assert (model.vit_type, model.image_size) == ("large", 384)
    assert (model.load_pretrained, model.load_finetuned) == (True, False)
    assert model.pretrained == (
        "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_large.pth"
    )
    assert coco.vis_processor.train.name == "blip_image_train"
    assert coco.vis_processor.eval.name == "blip_image_eval"
    assert coco.text_processor.train.prompt == "a picture of "
    assert coco.build_info.annotations["val"] == AnnotationConfig(
        url=["https://storage.googleapis.com/sfr-vision-language-research/datasets/coco_karpathy_val.json"],
        md5=["b273847456ef5580e33713b1f7de52a0"],
        storage=["coco/annotations/coco_karpathy_val.json"],
    )
    assert (run.lr_sched, run.init_lr, run.min_lr, run.weight_decay) == ("linear_warmup_cosine_lr", 2e-6, 0.0, 0.05)
    assert (run.max_epoch, run.batch_size_train, run.batch_size_eval, run.num_workers) == (5, 16, 64, 4)
    assert (run.max_len, run.min_len, run.num_beams, run.seed, run.evaluate) == (20, 5, 3, 42, False)
    assert (run.train_splits, run.valid_splits, run.test_splits) == (["train"], ["val"], ["test"])
    replaced = ["run.amp", "run.device", "run.world_size", "run.dist_url", "run.distributed"]
    assert [notice.split(":")[0] for notice in notices] == replaced


def test_each_replaced_key_has_a_notice(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run: {seed: 1}")
    assert load_run_config(path)[1] == []
    _, notices = load_run_config(path, [f"run.{key}=1" for key in REPLACED_RUN_KEYS])
    assert notices == [f"run.{key}: {reason}" for key, reason in REPLACED_RUN_KEYS.items()]
    assert set(REPLACED_RUN_KEYS) == {
        *("amp", "device", "world_size", "dist_url", "distributed", "use_dist_eval_sampler")
    }


def test_whole_floats_are_integers(load):
    config = load(
        "run: {runner: runner_iter, max_iters: 2e4, iters_per_inner_epoch: 2e3}\n"
        "datasets: {shapes_caption: {captions_per_image: 2.0, num_images: {train: 1e2}}}",
        "run.warmup_steps=1e3",
    )
    values = (config.run.max_iters, config.run.iters_per_inner_epoch, config.run.warmup_steps)
    shapes = config.datasets["shapes_caption"]
    values += (shapes.captions_per_image, shapes.num_images["train"])
    assert values == (20000, 2000, 1000, 2, 100)
    assert all(type(value) is int for value in values)


def test_a_number_without_a_space_after_its_colon(load):
    """YAML takes {train:9} as a key `train:9` without a value."""
    with pytest.raises(
        UserError, match=r"^datasets.shapes_caption.num_images.train:9 has no value \(YAML wants a space"
    ):
        load("datasets: {shapes_caption: {num_images: {train:9}}}")


def test_a_mapping_for_a_list_that_may_be_null(load):
    with pytest.raises(
        UserError, match=r"^datasets.shapes_caption.vis_processor.eval.std is {'a': 1}; expected a list"
    ):
        load("datasets: {shapes_caption: {vis_processor: {eval: {std: {a: 1}}}}}")


def test_one_name_for_a_list(load):
    config = load(
        "datasets: {custom_caption: {build_info: {annotations: {train: {storage: train.json}}}}}\n"
        "run: {valid_splits: val}"
    )
    assert config.datasets["custom_caption"].build_info.annotations["train"].storage == ["train.json"]
    assert config.run.valid_splits == ["val"]


def test_a_path_in_place_of_a_splits_section(load):
    config = load(
        "datasets: {coco_caption: {build_info: {annotations: {train: a.tar, val: [b.csv, c.csv]}}}}",
        "datasets.coco_caption.build_info.annotations.test=d",
    )
    annotations = config.datasets["coco_caption"].build_info.annotations
    assert {split: files.storage for split, files in annotations.items()} == {
        "train": ["a.tar"],
        "val": ["b.csv", "c.csv"],
        "test": ["d"],
    }
    assert (annotations["train"].url, annotations["train"].md5) == ([], [])  # the packaged ones are of another file


def test_lavis_evaluation_processors_may_have_an_empty_prompt(load):
    config = load("datasets: {coco_caption: {text_processor: {eval: {name: blip_caption, prompt: ''}}}}")
    assert config.datasets["coco_caption"].text_processor.eval.prompt == ""


# --- mistakes ---


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("run: {max_epohc: 3}", "unknown key run.max_epohc; did you mean 'max_epoch'? allowed: accum_grad_iters, "),
        ("modle: {}", "unknown key modle; did you mean 'model'? allowed: datasets, env, model, run"),
        ("env: {cash_root: /}", "unknown key env.cash_root; did you mean 'cache_root'? allowed: cache_root"),
        (
            "datasets: {coco_caption: {build_info: {annotations: {train: {storag: a}}}}}",
            "unknown key datasets.coco_caption.build_info.annotations.train.storag; did you mean 'storage'?",
        ),
        (
            "model: {model_type: large}",
            "model.model_type is 'large'; did you mean 'large_coco'? allowed: base_coco, large_coco, tiny",
        ),
        ("model: {arch: blip_captoin}", "unknown model.arch 'blip_captoin'; did you mean 'blip_caption'? allowed: "),
        ("run: {task: caption}", "run.task is 'caption'; did you mean 'captioning'? allowed: captioning"),
        (
            "run: {runner: runner_its}",
            "run.runner is 'runner_its'; did you mean 'runner_iter'? allowed: runner_base, runner_iter",
        ),
        ("run: {eval_precision: fp8}", "run.eval_precision is 'fp8'; allowed: bf16, fp16, fp32"),
        ("run: {weight_decay_on: al}", "run.weight_decay_on is 'al'; did you mean 'all'? allowed: all, matrices"),
        ("model: 5", "model is 5; expected a section with arch, "),
        ("run: {batch_size_train: 0}", "run.batch_size_train is 0; allowed: 1 or more"),
        ("run: {val_freq: 0}", "run.val_freq is 0; allowed: 1 or more"),
        ("model: {prompt: a photo of}", "model.prompt is 'a photo of'; allowed: a text that ends in a space"),
        ("run: {limit_train: 0}", "run.limit_train is 0; allowed: more than 0, or null"),
        ("run: {top_p: 1.5}", "run.top_p is 1.5; allowed: more than 0, at most 1"),
        ("run: {init_lr: .inf}", "run.init_lr is inf; allowed: 0 or more"),
        ("run: {length_penalty: .nan}", "run.length_penalty is nan; allowed: a number"),
        (
            "datasets: {coco_caption: {vis_processor: {eval: {std: [1, 0, 1]}}}}",
            "vis_processor: std is [1.0, 0.0, 1.0]; allowed: three numbers above 0",
        ),
        (
            "datasets: {coco_caption: {vis_processor: {train: {min_scale: 0.9, max_scale: 0.2}}}}",
            "vis_processor: [min_scale, max_scale] is [0.9, 0.2]; allowed: more than 0, at most 1, the smaller",
        ),
        ("model: {label_smoothing: 1}", "model.label_smoothing is 1.0; allowed: 0 or more, below 1"),
        (
            "model: {cache_image_embeds: true}",
            "model.cache_image_embeds needs model.freeze_vit: features of an encoder that learns change",
        ),
        (
            "datasets: {coco_caption: {captions_per_image: every}}",
            "datasets.coco_caption.captions_per_image is 'every'; allowed: a number from 1, or all",
        ),
    ],
)
def test_unknown_names_and_values(load, text, start):
    assert fails(load, text).startswith(start)


@pytest.mark.parametrize(
    ("option", "key", "given", "wanted"),
    [
        ("run.max_epoch=abc", "run.max_epoch", "'abc'", "Integer"),
        ("run.max_epoch=2.5", "run.max_epoch", "'2.5'", "Integer"),
        ("run.init_lr=fast", "run.init_lr", "'fast'", "Float"),
        ("run.evaluate=maybe", "run.evaluate", "'maybe'", "bool"),
        ("model.image_size=", "model.image_size", "None", "int"),
        ("datasets.coco_caption.captions_per_image=1.5", "captions_per_image", "'1.5'", "Union[int, str]"),
    ],
)
def test_wrong_types(load, option, key, given, wanted):
    message = fails(load, "datasets: {coco_caption: {}}", option)
    assert re.search(rf"\b{re.escape(key)}: .*{re.escape(given)}.*{re.escape(wanted)}", message), message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {runner: runner_iter}", "run.runner is runner_iter but run.max_iters is not given"),
        (
            "run: {max_iters: 10}",
            "run.max_iters is given but run.runner is runner_base, which counts max_epoch epochs",
        ),
        ("run: {use_nucleus_sampling: true}", "run.use_nucleus_sampling needs run.num_beams=1, not 3"),
        ("run: {min_len: 20}", "run.max_len is 20; allowed: more than run.min_len (20)"),
        (
            "datasets: {coco_caption: {vis_processor: {train: {image_size: 224}}}}",
            "datasets.coco_caption.vis_processor.train.image_size is 224; allowed: null or model.image_size (384)",
        ),
        (
            "datasets: {coco_caption: {text_processor: {train: {prompt: 'a photo of '}}}}",
            "datasets.coco_caption.text_processor.train.prompt is 'a photo of '; "
            "allowed: null or model.prompt ('a picture of '), which is also what the loss leaves out",
        ),
        (
            "datasets: {coco_caption: {}, nocaps: {}}\nrun: {train_dataset_ratios: {coco_caption: 1}}",
            "run.train_dataset_ratios names ['coco_caption'], but the datasets are ['coco_caption', 'nocaps']",
        ),
        (
            "datasets: {coco_caption: {}}\nrun: {train_dataset_ratios: {coco_caption: 0}}",
            "run.train_dataset_ratios.coco_caption is 0.0; allowed: more than 0",
        ),
    ],
)
def test_keys_that_do_not_go_together(load, text, message):
    assert fails(load, text) == message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("run: {seed: 1", "run.yaml is not a YAML file"),
        ("run: {seed: 1, seed: 2}", "duplicate key seed"),
        ("- run", "run.yaml holds no mapping; expected the sections model, datasets, run"),
    ],
)
def test_files_that_are_no_config(load, text, part):
    assert part in fails(load, text)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=f"^no such config file: {tmp_path}/a.yaml$"):
        load_run_config(tmp_path / "a.yaml")
    with pytest.raises(UserError, match="is a directory"):
        load_run_config(tmp_path)


def test_a_packaged_config_brings_the_files_that_it_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, _ = load_run_config(Path("caption_flickr8k_tiny"))
    text_decoder = json.loads((ROOT / "run_configs" / "med_config_flickr8k_tiny.json").read_text())
    assert config.model.hidden_size == text_decoder["hidden_size"]
    assert fails(load_run_config, Path("caption_flickr8k_tniy")).startswith(
        "no such config file: caption_flickr8k_tniy; did you mean 'caption_flickr8k_tiny'? packaged: caption_coco_base,"
    )


def test_options_that_are_no_assignment(load):
    assert fails(load, "", "run.seed") == "--options run.seed: expected key.path=value"
    assert fails(load, "", "run.lr_sched=[a").startswith("--options run.lr_sched=[a: ")
    assert fails(load, "", "=3").startswith("unknown key ; allowed: ")
    assert fails(load, "", "run..seed=3").startswith("unknown key run.; allowed: ")


# --- what comes with the package ---


@pytest.mark.parametrize("path", sorted((ROOT / "run_configs").glob("*.yaml")), ids=lambda path: path.name)
def test_run_configs_load(path):
    config, _ = load_run_config(path)
    assert config.datasets


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_models_load(load, path):
    model = load(f"model: {{arch: blip_caption, model_type: {path.stem}}}").model
    assert (model.arch, model.model_type) == ("blip_caption", path.stem)
    assert read_text_config(model.med_config_path).num_hidden_layers in (2, 12)


@pytest.mark.parametrize("path", sorted(PACKAGED_DATASETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_datasets_load(load, path):
    dataset = load(f"datasets: {{{path.stem}: {{}}}}").datasets[path.stem]
    assert DATASETS[path.stem]
    for kind in ("train", "eval"):
        assert PROCESSORS[getattr(dataset.vis_processor, kind).name]
        assert PROCESSORS[getattr(dataset.text_processor, kind).name]
