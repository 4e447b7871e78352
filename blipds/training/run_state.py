"""Where a run stands, and how far it goes."""

from dataclasses import dataclass


@dataclass
class RunState:
    """Where a run stands; everything else follows from it and the config."""

    global_step: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    awaited_step: int | None = None  # evaluated, and the scores are still to come
    bad_steps: int = 0  # skipped, because a loss or a gradient was not finite


@dataclass(frozen=True)
class Plan:
    """How long, and when to look: all in optimizer steps.

    An epoch is a pass over the data (runner_base) or `iters_per_inner_epoch` steps (runner_iter).
    """

    epoch_steps: int
    total_steps: int
    log_steps: int
    val_epochs: int
    val_steps: int | None
    save_epochs: int
    save_steps: int | None
    save_last: bool

    @property
    def epochs(self) -> int:
        return -(-self.total_steps // self.epoch_steps)

    def epoch_ends(self, step: int) -> bool:
        return step % self.epoch_steps == 0 or step == self.total_steps

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that the step with number `step` (from 1) belongs to."""
        return (step - 1) // self.epoch_steps

    def logs(self, step: int) -> bool:
        return step % self.log_steps == 0 or self.epoch_ends(step)

    def validates(self, step: int) -> bool:
        by_epoch = self.epoch_ends(step) and (
            (self.epoch_of(step) + 1) % self.val_epochs == 0 or step == self.total_steps
        )
        return by_epoch or (self.val_steps is not None and step % self.val_steps == 0)

    def saves(self, step: int) -> bool:
        if step == self.total_steps:
            return self.save_last
        by_epoch = self.epoch_ends(step) and (self.epoch_of(step) + 1) % self.save_epochs == 0
        return by_epoch or (self.save_steps is not None and step % self.save_steps == 0)
