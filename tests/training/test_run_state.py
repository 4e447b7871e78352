"""The arithmetic of a run: steps counted by hand."""

from dataclasses import replace

from blipds.training.run_state import Plan

# three epochs of ten steps
PLAN = Plan(
    epoch_steps=10,
    total_steps=30,
    log_steps=4,
    val_epochs=1,
    val_steps=None,
    save_epochs=1,
    save_steps=None,
    save_last=True,
)
# runner_iter: 25 steps, an inner epoch of 10
ITERATIONS = replace(PLAN, total_steps=25)


def steps(plan, question):
    return [step for step in range(1, plan.total_steps + 1) if question(plan, step)]


def test_epochs():
    assert PLAN.epochs == 3
    assert [PLAN.epoch_of(step) for step in (1, 10, 11, 20, 21, 30)] == [0, 0, 1, 1, 2, 2]
    assert steps(PLAN, Plan.epoch_ends) == [10, 20, 30]


def test_the_last_inner_epoch_may_be_short():
    assert ITERATIONS.epochs == 3
    assert [ITERATIONS.epoch_of(step) for step in (20, 21, 25)] == [1, 2, 2]
    assert steps(ITERATIONS, Plan.epoch_ends) == [10, 20, 25]


def test_a_run_shorter_than_an_epoch():
    plan = replace(PLAN, total_steps=3)
    assert plan.epochs == 1
    assert steps(plan, Plan.epoch_ends) == steps(plan, Plan.logs) == steps(plan, Plan.validates) == [3]


def test_logs_every_few_steps_and_at_the_end_of_each_epoch():
    assert steps(PLAN, Plan.logs) == [4, 8, 10, 12, 16, 20, 24, 28, 30]
    assert steps(ITERATIONS, Plan.logs) == [4, 8, 10, 12, 16, 20, 24, 25]


def test_validates_by_epoch_and_always_at_the_end():
    assert steps(PLAN, Plan.validates) == [10, 20, 30]
    assert steps(replace(PLAN, val_epochs=2), Plan.validates) == [20, 30]
    assert steps(replace(PLAN, val_epochs=7), Plan.validates) == [30]
    assert steps(replace(ITERATIONS, val_epochs=2), Plan.validates) == [20, 25]


def test_validates_by_steps_besides():
    assert steps(replace(PLAN, val_epochs=2, val_steps=7), Plan.validates) == [7, 14, 20, 21, 28, 30]


def test_saves_by_epoch_and_last():
    assert steps(PLAN, Plan.saves) == [10, 20, 30]
    assert steps(replace(PLAN, save_epochs=2), Plan.saves) == [20, 30]
    assert steps(replace(PLAN, save_last=False), Plan.saves) == [10, 20]
    assert steps(ITERATIONS, Plan.saves) == [10, 20, 25]


def test_saves_by_steps_besides():
    assert steps(replace(PLAN, save_steps=4), Plan.saves) == [4, 8, 10, 12, 16, 20, 24, 28, 30]
    assert steps(replace(PLAN, save_epochs=9, save_steps=15, save_last=False), Plan.saves) == [15]
