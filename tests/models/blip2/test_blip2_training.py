"""The loop under DeepSpeed computes what LAVIS's BLIP-2 code computes, whatever the stage and the number of ranks."""

import json
from pathlib import Path

import pytest
from launching import launch
from safetensors.torch import load_file
from transformers import Qwen2Config

from blipds.config.run import load_run_config

FP32 = {"bf16": {"enabled": False}, "fp16": {"enabled": False}, "steps_per_print": 10**9}


def train(folder, ranks, specs):
    spec, losses = folder / "spec.json", folder / "losses.json"
    spec.write_text(json.dumps(specs))
    process = launch(ranks, "tests/engine/grid.py", spec, losses)
    assert process.returncode == 0, process.stdout[-4000:]
    return json.loads(losses.read_text())


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_eight_losses_of_lavis(ranks, golden, run_config, tmp_path):
    specs = [
        {
            "name": f"{key} {stage}",
            "cfg": str(run_config),
            "ds": {"zero_optimization": {"stage": stage}, **FP32},
            "options": [
                *("run.runner=runner_iter", "run.max_iters=8", "run.log_freq=1", "run.save_last=false"),
                *(f"run.batch_size_train={8 // ranks}", f"model.freeze_vit={key == 'loss_vit_frozen'}"),
                f"model.use_grad_checkpoint={stage % 2 == 1}",
            ],
        }
        for stage in (0, 1, 2, 3)
        for key in ("loss_vit_trains", "loss_vit_frozen")
    ]
    for name, result in train(tmp_path, ranks, specs).items():
        assert result["losses"] == pytest.approx(golden["train"][name.split()[0]], rel=1e-4), name


def test_resuming_without_a_copy_of_the_language_model(golden, run_config, t5_run_config, tmp_path):
    """Four steps of two ranks under ZeRO-3, the last four of one rank under ZeRO-2; checkpoints hold what learns."""
    options = ["run.runner=runner_iter", "run.max_iters=8", "run.log_freq=1", "run.save_steps=4"]
    common = {"cfg": str(run_config), "run_dir": str(tmp_path / "run")}
    first = {"name": "first", "ds": {"zero_optimization": {"stage": 3}, **FP32}, "until": 4}
    others = [other_language_model(run_config, tmp_path, stage) for stage in (0, 3)]
    short = [*options[:1], "run.max_iters=2", "run.log_freq=1", "run.save_last=false"]
    t5 = {"cfg": str(t5_run_config), "options": [*short, "run.batch_size_train=4", "model.use_grad_checkpoint=true"]}
    others += [t5 | {"name": f"t5 {stage}", "ds": {"zero_optimization": {"stage": stage}, **FP32}} for stage in (0, 3)]
    results = train(tmp_path, 2, [common | first | {"options": [*options, "run.batch_size_train=4"]}, *others])
    for kind in ("qwen2", "t5"):
        assert results[f"{kind} 3"]["losses"] == pytest.approx(results[f"{kind} 0"]["losses"], rel=1e-4)
    weights = load_file(tmp_path / "run" / "checkpoints" / "step_00000004" / "model.safetensors")
    assert {name.partition(".")[0] for name in weights} == {"visual_encoder", "bridge"}

    then = {"name": "then", "ds": {"zero_optimization": {"stage": 2}, **FP32}, "resume": str(tmp_path / "run")}
    bf16 = {
        "name": "bf16",
        "ds": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
        "cfg": str(run_config),
    }
    results = train(
        tmp_path, 1, [common | then | {"options": [*options, "run.batch_size_train=8"]}, bf16 | {"options": short}]
    )
    assert results["then"]["losses"] == pytest.approx(golden["train"]["loss_vit_trains"][4:], rel=1e-4)
    assert results["bf16"]["losses"] == pytest.approx(golden["train"]["loss_vit_trains"][:2], rel=2e-2)


def other_language_model(run_config, folder, stage):
    """Two steps with a language model of another kind, whose rotary frequencies are buffers; random weights."""
    config = Qwen2Config(vocab_size=2000, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128})
    config.save_pretrained(folder / "qwen2")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        opt = Path(load_run_config(run_config)[0].model.opt_model)
        (folder / "qwen2" / name).write_bytes((opt / name).read_bytes())
    options = [
        *("run.runner=runner_iter", "run.max_iters=2", "run.log_freq=1", "run.save_last=false"),
        *("run.batch_size_train=4", "model.load_finetuned=false", "model.load_llm=false"),
        f"model.llm={folder}/qwen2",
    ]
    ds = {"zero_optimization": {"stage": stage}, **FP32}
    return {"name": f"qwen2 {stage}", "cfg": str(run_config), "ds": ds, "options": options}
