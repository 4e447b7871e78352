"""Where a run stands, and how far it goes."""

from dataclasses import dataclass

from blipds.config.sections import RunConfig


@dataclass
class RunState:
    """Where a run stands; everything else follows from it and the config. Kept in every checkpoint."""

    global_step: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    awaited_step: int | None = None  # whose validation is due: its captions, or only its scores, are still to come
    bad_steps: int = 0  # skipped, because a loss or a gradient was not finite
    samples: int | None = None  # of a pass over the training data, where that is known
    empty_steps: int = 0  # in a row, the newest ones: nothing in them could be learnt from


@dataclass(frozen=True)
class StepPlan:
    """How long a run is, and after which steps it logs, validates and saves. All in optimizer steps, from 1.

    An epoch is a pass over the data (runner_base) or `iters_per_inner_epoch` steps (runner_iter).
    """

    run: RunConfig
    epoch_steps: int
    total_steps: int

    @classmethod
    def of(cls, run: RunConfig, steps_per_pass: int) -> "StepPlan":
        if run.max_iters is None:
            return cls(run, steps_per_pass, run.max_epoch * steps_per_pass)
        return cls(run, min(run.iters_per_inner_epoch or steps_per_pass, run.max_iters), run.max_iters)

    @property
    def epochs(self) -> int:
        return -(-self.total_steps // self.epoch_steps)

    def epoch_ends(self, step: int) -> bool:
        return step % self.epoch_steps == 0 or step == self.total_steps

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that a step belongs to."""
        return (step - 1) // self.epoch_steps

    def logs(self, step: int) -> bool:
        return step % self.run.log_freq == 0 or self.epoch_ends(step)

    def validates(self, step: int) -> bool:
        by_epoch = self.every_epochs(step, self.run.val_freq) or step == self.total_steps
        return by_epoch or (self.run.val_steps is not None and step % self.run.val_steps == 0)

    def saves(self, step: int) -> bool:
        if step == self.total_steps:
            return self.run.save_last
        by_steps = self.run.save_steps is not None and step % self.run.save_steps == 0
        return by_steps or self.every_epochs(step, self.run.save_freq)

    def every_epochs(self, step: int, epochs: int) -> bool:
        """Whether a step ends an epoch whose number, from 1, is a multiple of `epochs`."""
        return self.epoch_ends(step) and (self.epoch_of(step) + 1) % epochs == 0
