"""The loop: epochs of optimizer steps, with evaluation and checkpoints in between."""

import gc
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from blipds import distributed
from blipds.config.sections import RunConfig
from blipds.data.loader import Batch, TrainLoader, derive_seed
from blipds.engine import Engine
from blipds.engine.checkpoints import CheckpointFolder, shape_of
from blipds.errors import UserError
from blipds.monitor import Monitor
from blipds.signals import STOPPING, StallWatch, Stopped, StopSignals
from blipds.training.objectives import Objective
from blipds.training.run_state import RunState, StepPlan
from blipds.training.schedules import Schedule
from blipds.training.validation import Validation


class StepSignals:
    """What single ranks knew before a step and all know after it: a checkpoint is due, scores or a signal came.

    The arguments are sums over ranks, in the order of `Trainer.local_signals`.
    """

    def __init__(self, save: float, scored: float, written: float, *stop: float) -> None:
        self.save = save > 0
        self.scored = scored > 0
        self.written = written == distributed.world_size()  # the files of a checkpoint, by all of them
        self.signal = next((number.name for number, count in zip(STOPPING, stop, strict=True) if count), "")
        self.stop = self.signal != ""


class LogSums:
    """Sums since the last log line. All but the loss are over all ranks, and skipped steps count for none.

    The loss is this rank's until it is read, and stays on the device: reading it is the one sync of a log step.
    """

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros(1, dtype=torch.float64, device=device)
        self.weight = self.images = self.captions = self.errors = 0.0
        self.started = time.perf_counter()
        self.waited = 0.0


@dataclass(eq=False)
class Trainer:
    """Trains an engine. Every rank makes one and calls `train`."""

    run: RunConfig
    run_dir: Path
    engine: Engine
    objective: Objective
    loader: TrainLoader
    schedule: Schedule
    validation: Validation
    checkpoints: CheckpointFolder
    monitor: Monitor
    plan: StepPlan
    state: RunState

    def __post_init__(self) -> None:
        self.stop = StopSignals()
        self.save_seconds = math.inf if self.run.save_minutes is None else 60 * self.run.save_minutes
        self.saved = time.monotonic()
        self.save_cost = 0.0  # seconds that the newest checkpoint took from the run
        self.bad_in_a_row = 0
        self.bad_images: list[str] = []  # of this rank, since the start
        self.sums = LogSums(self.engine.device)
        self.shown: dict[str, str] = {}  # behind the progress bar, renewed at log steps

    def train(self) -> None:
        """Trains from where `state` stands to the end of the plan, and to the last scores. Collective.

        Raises Stopped when any rank was told to stop, after a step and a checkpoint.
        """
        watch = StallWatch(self.run_dir / "stacks" / f"rank{distributed.rank()}.txt", self.run.stall_minutes)
        # Libraries, model and engine stay as long as the run. Python's collector would search them again every few
        # steps, for 0.1 to 0.5 s, each time on another rank while the rest wait.
        gc.collect()
        gc.freeze()
        try:
            with self.stop:
                self.train_steps(watch)
        finally:
            gc.unfreeze()
            watch.close()

    def train_steps(self, watch: StallWatch) -> None:
        plan, state = self.plan, self.state
        self.engine.train()
        windows = self.windows()
        if state.global_step < plan.total_steps:
            self.open_epoch()
        else:
            again = "" if state.awaited_step is None else "; its captions are scored again"
            self.monitor.say(f"the run had ended after step {state.global_step}{again}")
        if state.awaited_step is not None:
            self.validate()
        while state.global_step < plan.total_steps:
            watch.moved()
            asked = time.perf_counter()
            window = next(windows)
            self.sums.waited += time.perf_counter() - asked

            step = state.global_step + 1
            learning_rate = self.schedule.lr(plan.epoch_of(step), (step - 1) % plan.epoch_steps, step - 1)
            norm, signals = self.train_step(window, learning_rate, measure=plan.logs(step))
            state.global_step = step

            if plan.logs(step):
                self.log(learning_rate, norm)
            self.monitor.advance((step - 1) % plan.epoch_steps + 1, self.shown)
            if state.empty_steps >= min(self.loader.steps_per_epoch, plan.total_steps):
                raise self.nothing_to_learn()
            if signals.written:
                self.finish_save()
            if signals.scored:
                self.take_scores()
            validates = plan.validates(step) and bool(self.validation.evaluators)
            if validates:
                self.wait_for_scores(may_stop=False)  # of the validation before, where it scores slower than it trains
                self.validation.open()
            if validates or plan.saves(step) or signals.save or signals.stop:
                self.save(best=not self.validation.evaluators)
            if validates or signals.stop or step == plan.total_steps:
                self.finish_save()
            if signals.stop and (validates or step < plan.total_steps):
                raise self.stopped(signals)
            if validates:
                self.validate()
            if plan.epoch_ends(step) and step < plan.total_steps:
                self.open_epoch()
        self.wait_for_scores(may_stop=True)

    def stopped(self, signals: StepSignals) -> Stopped:
        step = self.state.global_step
        return Stopped(f"stopped by {signals.signal} after step {step}; go on with --resume {self.run_dir}")

    def windows(self) -> Iterator[list[Batch]]:
        """Accumulation windows without end, pass after pass over the data, from where the run stands."""
        data_epoch, first_step = divmod(self.state.global_step, self.loader.steps_per_epoch)
        while True:
            yield from self.loader.windows(data_epoch, first_step)
            data_epoch, first_step = data_epoch + 1, 0

    def train_step(self, window: list[Batch], learning_rate: float, measure: bool) -> tuple[float | None, StepSignals]:
        """One optimizer step on the global batch of which `window` is this rank's share. Collective.

        The gradient is that of the mean loss over the whole global batch: its weight (labelled tokens, for
        cross-entropy) is summed over the ranks before the first backward, by one small all-reduce, and DeepSpeed's own
        average over ranks is undone. Signals of single ranks ride on that all-reduce, so that all of them act after the
        same step.
        """
        engine, objective = self.engine, self.objective
        window = objective.prepare(engine, window, self.state.global_step)
        counts = [(objective.weight(b), b.num_images, b.num_captions, len(b.errors)) for b in window]
        self.bad_images += [error for batch in window for error in batch.errors]
        local = [*map(sum, zip(*counts, strict=True)), *self.local_signals()]
        summed = torch.tensor(local, dtype=torch.float64)
        summed = distributed.sum_over_ranks(summed.to(engine.device, non_blocking=True))
        on_host = distributed.ReadLater(summed)
        scale = distributed.world_size() / torch.where(summed[0] == 0, 1, summed[0])

        # dropout depends on seed, step and rank alone, so a resumed run needs no saved random state
        torch.manual_seed(derive_seed(self.run.seed, "dropout", self.state.global_step, distributed.rank()))
        norm = None
        window_loss = torch.zeros_like(self.sums.loss)
        for batch in window:
            loss = objective.loss(engine, batch)
            engine.backward(loss * scale.to(loss.dtype))
            window_loss += loss.detach()
            norm = engine.step(learning_rate, measure and batch is window[-1])
        weight, images, captions, errors, *signals = on_host.numbers()
        self.state.empty_steps = 0 if weight else self.state.empty_steps + 1
        self.sums.errors += errors
        if engine.skipped:
            self.skip(window, learning_rate, window_loss.item())
        else:
            self.bad_in_a_row = 0
            self.sums.loss += window_loss
            self.sums.weight += weight
            self.sums.images += images
            self.sums.captions += captions
        return norm, StepSignals(*signals)

    def local_signals(self) -> list[float]:
        """What this rank knows; summed over ranks, the arguments of StepSignals."""
        save_due = distributed.is_main() and time.monotonic() - self.saved > self.save_seconds
        stop = [self.stop.received == number.name for number in STOPPING]
        return [save_due, self.validation.scored, self.checkpoints.written, *stop]

    def nothing_to_learn(self) -> UserError:
        """Why the newest steps, a whole pass over the data of them, had no weight. Collective."""
        self.finish_save()
        errors = self.report_bad_images(self.bad_images)
        why = "no training image can be read" if errors else "no training caption has a token to learn from"
        first = f": {'; '.join(errors[:3])}" if errors else ""
        return UserError(
            f"{why}, in {self.state.empty_steps} steps, a whole pass over the data or the whole run{first}"
        )

    def skip(self, window: list[Batch], learning_rate: float, loss: float) -> None:
        """Notes a step that was skipped, and its images; ends the run when there are too many in a row. Collective.

        In fp16 the loss scale is found by gradients that overflow: with a finite loss such a step is not named.
        """
        self.bad_in_a_row += 1
        losses = distributed.gather(loss)
        ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        listing = self.run_dir / "bad_steps.jsonl"
        if ranks or self.engine.precision != "fp16":
            self.state.bad_steps += 1
            names = distributed.gather([name for batch in window for name in batch.names if name])
            if distributed.is_main():
                images = {rank: names[rank] for rank in ranks or range(len(names))}
                self.write_bad_step(listing, images, learning_rate, losses)
        if self.bad_in_a_row < self.run.max_bad_steps:
            return
        self.finish_save()
        where = self.engine.find_non_finite(self.objective.loss(self.engine, batch) for batch in window)
        places = [f"rank {rank}: {place}" for rank, place in enumerate(distributed.gather(where)) if place]
        scale = "" if self.engine.loss_scale is None else f", loss scale {self.engine.loss_scale:g}"
        raise UserError(
            f"{self.bad_in_a_row} steps in a row with a loss or gradient that is not finite (run.max_bad_steps is "
            f"{self.run.max_bad_steps}), the last is step {self.state.global_step + 1}; first met at "
            f"{'; '.join(places) or 'a place that was not found again'}; learning rate {learning_rate:g}{scale}; the "
            f"images are in {listing}, and the checkpoints hold no such step"
        )

    def write_bad_step(self, listing: Path, images: dict[int, list[str]], lr: float, losses: list[float]) -> None:
        """`images`: of each rank that the step went wrong on."""
        step = self.state.global_step + 1
        what = "loss" if not all(map(math.isfinite, losses)) else "gradient"
        line = {
            "step": step,
            "not_finite": what,
            "losses": [loss if math.isfinite(loss) else str(loss) for loss in losses],
            "lr": lr,
            "loss_scale": self.engine.loss_scale,
            "images": images,
        }
        with listing.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.monitor.say(f"step {step} is skipped, its {what} is not finite; its images are in {listing}")

    def open_epoch(self) -> None:
        plan = self.plan
        epoch, done = divmod(self.state.global_step, plan.epoch_steps)
        steps = min(plan.epoch_steps, plan.total_steps - epoch * plan.epoch_steps)
        self.monitor.start_epoch(epoch, plan.epochs, steps, done)
        self.sums = LogSums(self.engine.device)

    def log(self, learning_rate: float, norm: float | None) -> None:
        """Writes what happened since the last log line. Collective."""
        sums, step, engine = self.sums, self.state.global_step, self.engine
        loss = distributed.sum_over_ranks(sums.loss).item()
        seconds = time.perf_counter() - sums.started
        values: dict[str, float | None] = {
            "loss": loss / sums.weight if sums.weight else None,  # none: all of the steps were skipped, or empty
            "lr": learning_rate,
            "grad_norm": norm,
            "images_per_s": sums.images / seconds,
            "captions_per_s": sums.captions / seconds,
            "data_wait": sums.waited / seconds,
        }
        if engine.device.type == "cuda":
            values["device_memory_gb"] = engine.peak_memory() / 1e9
        if engine.loss_scale is not None:
            values |= {"loss_scale": engine.loss_scale, "skipped_steps": engine.skipped_steps}
        values |= self.objective.metrics()
        self.monitor.train(step, self.plan.epoch_of(step), values)
        if examples := self.objective.examples():
            self.monitor.examples(step, examples)
        self.shown = {
            "loss": "-" if values["loss"] is None else f"{values['loss']:.4f}",
            "lr": f"{learning_rate:.2e}",
            "img/s": f"{values['images_per_s']:.1f}",
            "cap/s": f"{values['captions_per_s']:.1f}",
            "wait": f"{values['data_wait']:.0%}",
            **{name: f"{values[name]:.3f}" for name in self.objective.shown},
        }
        self.sums = LogSums(engine.device)
        if sums.errors:
            self.report_bad_images(self.bad_images)

    def report_bad_images(self, mine: list[str]) -> list[str]:
        """Names and returns the unreadable images of all ranks; ends the run when they are too many. Collective."""
        errors = sorted({error for share in distributed.gather(mine) for error in share})
        if not errors:
            return errors
        listing = self.run_dir / "bad_images.txt"
        if distributed.is_main():
            known = set(listing.read_text("utf-8", "surrogateescape").splitlines()) if listing.exists() else set()
            new = [error for error in errors if error not in known]
            text = "".join(f"{error}\n" for error in sorted(known | set(errors)))
            listing.write_text(text, "utf-8", "surrogateescape")
            for error in new[:3]:
                self.monitor.say(f"skipped: {error}")
            if new[3:]:
                self.monitor.say(f"skipped: {len(new) - 3} more unreadable images, listed in {listing}")
        if len(errors) > self.run.max_bad_images:
            self.finish_save()
            raise UserError(
                f"{len(errors)} images cannot be read, more than run.max_bad_images ({self.run.max_bad_images}); "
                f"they are listed in {listing}, the first: {errors[0]}"
            )
        return errors

    def validate(self) -> None:
        """Captions the validation splits, and has them scored beside the next steps. Collective.

        The step's checkpoint is there already: whatever fails here costs no training.
        """
        started = time.perf_counter()
        if self.validation.needs_captions():
            self.report_bad_images(self.validation.caption())
        self.validation.start_scoring()
        self.exclude_from_rates(started)

    def take_scores(self) -> None:
        """Collective."""
        started = time.perf_counter()
        self.validation.take_scores()
        self.exclude_from_rates(started)

    def wait_for_scores(self, may_stop: bool) -> None:
        """Waits for the scores that are still to come, if any. Collective, and no single call of it waits long.

        Raises Stopped when a rank is told to stop meanwhile and `may_stop`: the captions are scored after the resume.
        """
        while self.state.awaited_step is not None:
            local = torch.tensor(self.local_signals(), dtype=torch.float64, device=self.engine.device)
            signals = StepSignals(*distributed.sum_over_ranks(local).tolist())
            if signals.scored:
                self.take_scores()
            elif signals.stop and may_stop:
                raise self.stopped(signals)
            else:
                time.sleep(0.1)

    def save(self, best: bool) -> None:
        """Saves where the run stands, or begins to (run.async_save). Collective."""
        self.finish_save()
        self.monitor.flush()
        shape = shape_of(self.engine, self.loader.global_batch)
        started = time.perf_counter()
        failure = self.checkpoints.begin(self.engine, asdict(self.state), shape, best)
        self.save_cost = self.exclude_from_rates(started)
        self.saved = time.monotonic()
        if failure is not None:
            self.report_unsaved(self.state.global_step, failure)
        elif not self.checkpoints.background:
            self.finish_save()

    def finish_save(self) -> None:
        """Completes the checkpoint that was begun, if any, and waits for its files where they need it. Collective."""
        if self.checkpoints.begun is None:
            return
        step = self.checkpoints.begun.step
        started = time.perf_counter()
        failure = self.checkpoints.finish()
        self.save_cost += self.exclude_from_rates(started)
        if failure is None:
            self.monitor.checkpoint(step, self.save_cost)
        else:
            self.report_unsaved(step, failure)

    def exclude_from_rates(self, started: float) -> float:
        """Leaves the time since `started` out of the rates in the next log line; returns its seconds."""
        seconds = time.perf_counter() - started
        self.sums.started += seconds
        return seconds

    def report_unsaved(self, step: int, failure: str) -> None:
        """A full disk costs the checkpoint and no more; only after the last step it is an error."""
        line = f"the save after step {step} failed: {failure}"
        if step == self.plan.total_steps:
            raise UserError(f"{line}; mend that and go on with --resume {self.run_dir}")
        self.monitor.say(f"{line}; the run goes on, and the earlier checkpoints are as they were")

    def close(self) -> None:
        """Lets go of the engine's memory. Collective."""
        self.monitor.close()
        self.engine.close()
