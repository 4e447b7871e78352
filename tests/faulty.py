"""Schedules that break a run on rank 1 at its third step: `--plugin tests.faulty --options run.lr_sched=...`."""

import os
import signal

from blipds import distributed
from blipds.registry import SCHEDULES
from blipds.training.schedules import ConstantLR

STEP = 3  # counted from 1


def here(global_step: int) -> bool:
    return distributed.rank() == 1 and global_step + 1 == STEP


@SCHEDULES.register("raises")
class Raises(ConstantLR):
    def lr(self, epoch: int, step: int, global_step: int) -> float:
        if here(global_step):
            raise RuntimeError("the cable is broken")
        return super().lr(epoch, step, global_step)


@SCHEDULES.register("is_told_to_stop")
class IsToldToStop(ConstantLR):
    def lr(self, epoch: int, step: int, global_step: int) -> float:
        if here(global_step):
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().lr(epoch, step, global_step)
