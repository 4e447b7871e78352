"""Schedules against numbers worked out by hand."""

import pytest

import blipds.training.schedules  # noqa: F401  (registers them)
from blipds.errors import UserError
from blipds.registry import SCHEDULES

NAMES = ["constant_lr", "cosine_step_lr", "linear_warmup_cosine_lr", "linear_warmup_step_lr"]


def build(name, **changes):
    values = {
        "init_lr": 1e-5,
        "min_lr": 0.0,
        "warmup_lr": None,
        "warmup_steps": 0,
        "lr_decay_rate": 0.5,
        "max_epoch": 4,
        "total_steps": 40,
    }
    return SCHEDULES[name](**(values | changes))


def rates(schedule, *positions):
    return [schedule.lr(epoch, step, epoch * 10 + step) for epoch, step in positions]


def exactly(*values):
    return pytest.approx(list(values), rel=1e-12, abs=1e-20)


def test_names():
    assert set(NAMES) <= set(SCHEDULES.names())  # and those of plugins that other tests import


def test_cosine_moves_once_an_epoch():
    # (1 + cos(pi/4)) / 2 = 0.85355..., (1 + cos(pi/2)) / 2 = 0.5, (1 + cos(3 pi/4)) / 2 = 0.14644...
    schedule = build("linear_warmup_cosine_lr")
    assert rates(schedule, (0, 0), (0, 9)) == exactly(1e-5, 1e-5)
    assert rates(schedule, (1, 0), (1, 9)) == exactly(8.535533905932738e-6, 8.535533905932738e-6)
    assert rates(schedule, (2, 5), (3, 9)) == exactly(5e-6, 1.4644660940672624e-6)


def test_cosine_ends_above_min_lr():
    # 2e-6 + (1e-5 - 2e-6) * 0.5 = 6e-6
    assert rates(build("linear_warmup_cosine_lr", min_lr=2e-6), (2, 0)) == exactly(6e-6)


@pytest.mark.parametrize("name", ["constant_lr", "linear_warmup_cosine_lr", "linear_warmup_step_lr"])
def test_lavis_warmup_is_inside_the_first_epoch(name):
    # from 2e-6 by (1e-5 - 2e-6) / 4 = 2e-6 a step; then the first epoch stays at init_lr
    schedule = build(name, warmup_lr=2e-6, warmup_steps=4)
    assert rates(schedule, (0, 0), (0, 1), (0, 3)) == exactly(2e-6, 4e-6, 8e-6)
    assert rates(schedule, (0, 4), (0, 9)) == exactly(1e-5, 1e-5)


@pytest.mark.parametrize("name", ["constant_lr", "linear_warmup_cosine_lr", "linear_warmup_step_lr"])
@pytest.mark.parametrize("warmup_lr", [None, -1])
def test_lavis_has_no_warmup_without_a_warmup_lr(name, warmup_lr):
    assert rates(build(name, warmup_lr=warmup_lr, warmup_steps=1000), (0, 0), (0, 3)) == exactly(1e-5, 1e-5)


def test_lavis_warmup_longer_than_the_epoch_is_cut():
    schedule = build("constant_lr", warmup_lr=0.0, warmup_steps=20)
    assert rates(schedule, (0, 9), (1, 0)) == exactly(4.5e-6, 1e-5)


def test_step_decay_and_its_floor():
    schedule = build("linear_warmup_step_lr", min_lr=2e-6)
    assert rates(schedule, (0, 9), (1, 0), (2, 9), (3, 0)) == exactly(1e-5, 5e-6, 2.5e-6, 2e-6)


def test_constant():
    assert rates(build("constant_lr"), (0, 0), (1, 3), (3, 9)) == exactly(1e-5, 1e-5, 1e-5)


def test_cosine_by_the_step():
    # 40 steps: (1 + cos(pi g/40)) / 2 of 1e-5
    schedule = build("cosine_step_lr")
    assert rates(schedule, (0, 0), (1, 0), (2, 0), (3, 0)) == exactly(
        1e-5, 8.535533905932738e-6, 5e-6, 1.4644660940672624e-6
    )
    assert schedule.lr(4, 0, 40) == pytest.approx(0, abs=1e-20)
    assert schedule.lr(5, 0, 50) == pytest.approx(0, abs=1e-20)  # past the end it stays there


def test_cosine_by_the_step_warms_up_across_epochs():
    # 16 steps from 0, then the cosine over the other 24: a quarter of it at 22, half at 28
    schedule = build("cosine_step_lr", warmup_steps=16)
    assert rates(schedule, (0, 0), (0, 8), (1, 2), (1, 6)) == exactly(0, 5e-6, 7.5e-6, 1e-5)
    assert rates(schedule, (2, 2), (2, 8)) == exactly(8.535533905932738e-6, 5e-6)
    assert rates(build("cosine_step_lr", warmup_steps=16, warmup_lr=2e-6), (0, 0), (0, 8)) == exactly(2e-6, 6e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"min_lr": 2e-5}, "run.min_lr"),
        ({"min_lr": -1e-6}, "run.min_lr"),
        ({"warmup_lr": 2e-5, "warmup_steps": 5}, "run.warmup_lr"),
        ({"max_epoch": 0}, "nothing to schedule"),
        ({"total_steps": 0}, "nothing to schedule"),
    ],
)
def test_contradictions(name, changes, line):
    with pytest.raises(UserError, match=line):
        build(name, **changes)


@pytest.mark.parametrize("rate", [None, 0.0, 1.5])
def test_step_decay_needs_its_rate(rate):
    with pytest.raises(UserError, match="lr_decay_rate"):
        build("linear_warmup_step_lr", lr_decay_rate=rate)
