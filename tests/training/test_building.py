"""A checkpoint on other ranks or other data, worked out by hand."""

from pathlib import Path

import pytest
import torch

from blipds import distributed
from blipds.config.deepspeed import load_ds_config
from blipds.config.run import load_run_config
from blipds.config.sections import RunConfig
from blipds.errors import UserError
from blipds.planning.planner import Cluster, forecast
from blipds.training import building
from blipds.training.building import keep_global_batch, other_data
from blipds.training.run_state import RunState


@pytest.fixture
def ranks(monkeypatch):
    return lambda number: monkeypatch.setattr(distributed, "world_size", lambda: number)


@pytest.mark.parametrize(
    ("number", "micro", "accumulated"),
    [
        (1, 16, 8),  # 128 = 16 x 8 x 1
        (2, 16, 4),
        (16, 8, 1),  # fewer than 16 a rank are left
        (128, 1, 1),
    ],
)
def test_the_global_batch_stays_and_the_micro_batch_never_grows(ranks, number, micro, accumulated):
    ranks(number)
    run = RunConfig(batch_size_train=16, accum_grad_iters=2)
    line = keep_global_batch(run, {"global_batch": 128, "ranks": 4})
    assert (run.batch_size_train, run.accum_grad_iters) == (micro, accumulated)
    assert f"{number} ranks instead of 4" in line and "keep 128 samples a step" in line


def test_a_share_that_the_micro_batch_does_not_divide(ranks):
    ranks(2)
    run = RunConfig(batch_size_train=7)
    keep_global_batch(run, {"global_batch": 24, "ranks": 4})
    assert (run.batch_size_train, run.accum_grad_iters) == (6, 2)


def test_nothing_is_said_where_nothing_changes(ranks):
    ranks(4)
    assert keep_global_batch(RunConfig(batch_size_train=8), {"global_batch": 32, "ranks": 4}) is None


def test_what_cannot_be_shared_is_refused_with_the_choices(ranks):
    ranks(3)
    with pytest.raises(UserError, match=r"16 samples a step, which 3 ranks .*ranks that can: 1, 2, 4, 8, 16$"):
        keep_global_batch(RunConfig(), {"global_batch": 16, "ranks": 4})


def test_sizes_that_were_changed_are_named(ranks):
    ranks(4)
    with pytest.raises(UserError, match=r"with 32 samples a step, but run.batch_size_train 16 x .* x 4 ranks = 64"):
        keep_global_batch(RunConfig(batch_size_train=16), {"global_batch": 32, "ranks": 4})


@pytest.mark.parametrize(
    ("before", "now", "line"),
    [
        # 4 steps are done; of 10 samples, 4 a step, a pass has 3 steps: pass 2, its first step is done
        (16, 10, "10 samples, but the checkpoint was made on 16: goes on with step 2 of 3 in pass 2 over them"),
        (10, 10, None),
        (None, 10, None),  # a new run, or a checkpoint from before this was noted
        (16, 0, None),  # a stream
    ],
)
def test_a_checkpoint_made_on_other_data(before, now, line):
    state = RunState(global_step=4, samples=before)
    assert other_data(state, now, steps=3) == line
    assert state.samples == (now or None)


def test_a_gpu_that_is_too_small_is_one_line_with_what_would_fit(monkeypatch):
    """On a card for which the forecast was too low, too: what is proposed needs less than what did not fit."""
    folder = Path("ds_configs")
    config, _ = load_run_config(Path("tests/shapes_tiny.yaml"), ["run.batch_size_train=512"])
    ds, device = building.resolve(config, load_ds_config(folder / "zero2.json"), torch.device("cuda"), ""), "cuda"
    needs = forecast(config, ds, Cluster(1, 1, 80e9)).gpu
    said = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 4 GiB of which 1 is free. Of"
    for memory in (0.7 * needs, 1.1 * needs):
        monkeypatch.setattr(building, "this_cluster", lambda device, memory=memory: Cluster(1, 1, memory))
        error = building.out_of_memory(config, ds, torch.device(device), folder, torch.OutOfMemoryError(said))
        line = str(error)
        assert "\n" not in line and "20.00 MiB. GPU 0 has a total capacity of 4 GiB)" in line
        chosen, options = line.split("--ds-config ")[1].split(" --options ")
        changed, _ = load_run_config(Path("tests/shapes_tiny.yaml"), options.split())
        found = building.resolve(changed, load_ds_config(chosen), torch.device(device), chosen)
        assert changed.run.batch_size_train * changed.run.accum_grad_iters == 512
        assert forecast(changed, found, Cluster(1, 1, memory)).gpu < min(memory, needs)
