"""Learning-rate schedules: LAVIS's three, and a cosine by the step."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from blipds.errors import UserError
from blipds.registry import SCHEDULES


@dataclass(frozen=True)
class Schedule(ABC):
    """What all schedules share: plain values under the run config's names, and LAVIS's warm-up.

    `total_steps` counts the optimiser steps of the whole run.
    `warmup_lr` None (or below 0, as LAVIS writes it) means not given.
    A warm-up longer than the run (a quick try with few images) is cut off where the run ends.
    Raises UserError where values contradict each other.
    """

    init_lr: float
    max_epoch: int
    total_steps: int
    min_lr: float = 0.0
    warmup_lr: float | None = None
    warmup_steps: int = 0
    lr_decay_rate: float | None = None

    def __post_init__(self) -> None:
        if self.max_epoch < 1 or self.total_steps < 1:
            raise UserError(f"nothing to schedule: {self.total_steps} steps in {self.max_epoch} epochs")
        if not 0 <= self.min_lr <= self.init_lr:
            raise UserError(f"run.min_lr ({self.min_lr}) must lie between 0 and run.init_lr ({self.init_lr})")
        if self.start_lr > self.init_lr:
            raise UserError(f"run.warmup_lr ({self.warmup_lr}) must not exceed run.init_lr ({self.init_lr})")

    @property
    def start_lr(self) -> float:
        """Where the warm-up starts. LAVIS: without a `warmup_lr` at `init_lr`, which is no warm-up at all."""
        return self.init_lr if self.warmup_lr is None or self.warmup_lr < 0 else self.warmup_lr

    def warmed_up(self, step: int) -> float:
        """The straight line from `start_lr` at step 0 to `init_lr` at step `warmup_steps`, and `init_lr` after it."""
        return min(self.init_lr, self.start_lr + (self.init_lr - self.start_lr) * step / max(self.warmup_steps, 1))

    def cosine(self, progress: float) -> float:
        """From `init_lr` at progress 0 to `min_lr` at progress 1."""
        return self.min_lr + (self.init_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    @abstractmethod
    def lr(self, epoch: int, step: int, global_step: int) -> float:
        """The rate for the step about to be taken; `step` counts inside the epoch, and all three count from 0."""


@SCHEDULES.register("constant_lr")
class ConstantLR(Schedule):
    """Warm-up inside the first epoch, `init_lr` ever after (LAVIS)."""

    def lr(self, epoch: int, step: int, global_step: int) -> float:
        return self.warmed_up(step) if epoch == 0 else self.init_lr


@SCHEDULES.register("linear_warmup_cosine_lr")
class LinearWarmupCosineLR(Schedule):
    """Warm-up inside the first epoch, then a cosine that moves once an epoch (LAVIS; the BLIP paper's recipe).

    The last epoch runs at the cosine of (max_epoch - 1) / max_epoch, so above `min_lr`.
    """

    def lr(self, epoch: int, step: int, global_step: int) -> float:
        return self.warmed_up(step) if epoch == 0 else self.cosine(epoch / self.max_epoch)


@SCHEDULES.register("linear_warmup_step_lr")
class LinearWarmupStepLR(Schedule):
    """Warm-up inside the first epoch, then `init_lr` times `lr_decay_rate` once for each epoch (LAVIS)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_decay_rate is None or not 0 < self.lr_decay_rate <= 1:
            raise UserError(
                f"lr_sched 'linear_warmup_step_lr' needs run.lr_decay_rate above 0 and at most 1, "
                f"here it is {self.lr_decay_rate}"
            )

    def lr(self, epoch: int, step: int, global_step: int) -> float:
        assert self.lr_decay_rate is not None
        return self.warmed_up(step) if epoch == 0 else max(self.min_lr, self.init_lr * self.lr_decay_rate**epoch)


@SCHEDULES.register("cosine_step_lr")
class CosineStepLR(Schedule):
    """Warm-up over any number of epochs, then a cosine to `min_lr` that moves with every step.

    Without a `warmup_lr` the warm-up starts at 0: its first step moves no weight and fills Adam's moments.
    """

    @property
    def start_lr(self) -> float:
        if self.warmup_steps == 0:
            return self.init_lr
        return 0.0 if self.warmup_lr is None or self.warmup_lr < 0 else self.warmup_lr

    def lr(self, epoch: int, step: int, global_step: int) -> float:
        if global_step < self.warmup_steps:
            return self.warmed_up(global_step)
        rest = self.total_steps - self.warmup_steps
        return self.cosine(min(1.0, (global_step - self.warmup_steps) / rest))
