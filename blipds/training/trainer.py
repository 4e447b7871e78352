"""The loop: epochs of optimizer steps, with evaluation and checkpoints in between."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from blipds import distributed
from blipds.data.loader import Batch, TrainLoader, derive_seed
from blipds.engine import Engine
from blipds.engine.checkpoints import CheckpointFolder, shape_of
from blipds.errors import UserError
from blipds.monitor import Monitor
from blipds.signals import STOPPING, StallWatch, Stopped, StopSignals
from blipds.training.run_state import Plan, RunState
from blipds.training.schedules import Schedule
from blipds.training.validation import Validation


class Wishes:
    """What ranks knew before a step, and all know after it: a checkpoint is due, scores are there, a signal came."""

    def __init__(self, save: float, scored: float, written: float, *stop: float) -> None:
        self.save = save > 0
        self.scored = scored > 0
        self.written = written == distributed.world_size()  # the files of a checkpoint, by all of them
        self.signal = next((number.name for number, count in zip(STOPPING, stop, strict=True) if count), "")
        self.stop = self.signal != ""


class Totals:
    """Sums since the last log line, kept on the device: reading them is the one sync of a log step.

    labels, images, captions and errors are those of all ranks; the loss is this rank's until it is read.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(4, dtype=torch.float64, device=device)
        self.loss = torch.zeros(1, dtype=torch.float64, device=device)
        self.started = time.perf_counter()
        self.waited = 0.0


class Trainer:
    """Trains an engine. Every rank makes one and calls `train`."""

    def __init__(
        self,
        engine: Engine,
        loader: TrainLoader,
        schedule: Schedule,
        validation: Validation,
        checkpoints: CheckpointFolder,
        monitor: Monitor,
        plan: Plan,
        run_dir: Path,
        *,
        seed: int,
        save_minutes: float | None,
        max_bad_images: int,
        max_bad_steps: int,
        stall_minutes: float,
        state: RunState,
    ) -> None:
        self.engine = engine
        self.loader = loader
        self.schedule = schedule
        self.validation = validation
        self.checkpoints = checkpoints
        self.monitor = monitor
        self.plan = plan
        self.run_dir = run_dir
        self.seed = seed
        self.save_seconds = math.inf if save_minutes is None else 60 * save_minutes
        self.max_bad_images = max_bad_images
        self.max_bad_steps = max_bad_steps
        self.stall_minutes = stall_minutes
        self.state = state
        self.stop = StopSignals()
        self.saved = time.monotonic()
        self.save_cost = 0.0  # seconds that the newest checkpoint took from the run
        self.bad_in_a_row = 0
        self.bad_images: list[str] = []  # of this rank, since the start
        self.totals = Totals(engine.device)
        self.shown: dict[str, str] = {}  # behind the progress bar, renewed at log steps

    def train(self) -> None:
        """Trains from where `state` stands to the end of the plan, and to the last scores. Collective.

        Raises Stopped when any rank was told to stop, after a step and a checkpoint.
        """
        watch = StallWatch(self.run_dir / "stacks" / f"rank{distributed.rank()}.txt", self.stall_minutes)
        try:
            with self.stop:
                self.train_steps(watch)
        finally:
            watch.close()

    def train_steps(self, watch: StallWatch) -> None:
        plan, state = self.plan, self.state
        self.engine.train()
        windows = self.windows()
        self.open_epoch()
        if state.awaited_step is not None:  # of a run that ended before its scores came
            self.validation.start_scoring()
        while state.global_step < plan.total_steps:
            watch.moved()
            asked = time.perf_counter()
            window = next(windows)
            self.totals.waited += time.perf_counter() - asked

            step = state.global_step + 1
            learning_rate = self.schedule.lr(
                plan.epoch_of(step), state.global_step % plan.epoch_steps, state.global_step
            )
            norm, wishes = self.train_step(window, learning_rate, measure=plan.logs(step))
            state.global_step = step

            if plan.logs(step):
                self.log(learning_rate, norm)
            self.monitor.advance((step - 1) % plan.epoch_steps + 1, self.shown)
            if wishes.written:
                self.finish_save()
            if wishes.scored:
                self.take_scores()
            candidate = self.validate() if plan.validates(step) else False
            if candidate or plan.saves(step) or wishes.save or wishes.stop:
                self.save(best=not self.validation.evaluators)
            if wishes.stop or step == plan.total_steps:
                self.finish_save()
            if wishes.stop and step < plan.total_steps:
                raise self.stopped(wishes)
            if plan.epoch_ends(step) and step < plan.total_steps:
                self.open_epoch()
        self.wait_for_scores(may_stop=True)

    def stopped(self, wishes: "Wishes") -> Stopped:
        step = self.state.global_step
        return Stopped(f"stopped by {wishes.signal} after step {step}; go on with --resume {self.run_dir}")

    def windows(self) -> Iterator[list[Batch]]:
        """Accumulation windows without end, pass after pass over the data, from where the run stands."""
        data_epoch, first_step = divmod(self.state.global_step, self.loader.steps_per_epoch)
        while True:
            yield from self.loader.windows(data_epoch, first_step)
            data_epoch, first_step = data_epoch + 1, 0

    def train_step(self, window: list[Batch], learning_rate: float, measure: bool) -> tuple[float | None, "Wishes"]:
        """One optimizer step on the global batch of which `window` is this rank's share. Collective.

        The gradient is that of the mean loss over all labelled tokens of the global batch: they are counted over the
        ranks before the first backward (one small all-reduce), and DeepSpeed's own average over ranks is undone. What
        single ranks wish for rides on that all-reduce, so that all of them act after the same step.
        """
        engine = self.engine
        counts = torch.zeros(4, dtype=torch.float64)
        for batch in window:
            counts += torch.tensor(
                [len(batch.captions.labels), batch.num_images, batch.num_captions, len(batch.errors)]
            )
            self.bad_images += batch.errors
        summed = torch.cat([counts, self.own_wishes()]).to(engine.device, non_blocking=True)
        summed = distributed.sum_over_ranks(summed)
        counts, wishes = summed[:4], distributed.ReadLater(summed[4:])
        scale = distributed.world_size() / counts[0].clamp(min=1)

        # dropout depends on seed, step and rank alone, so a resumed run needs no saved random state
        torch.manual_seed(derive_seed(self.seed, "dropout", self.state.global_step, distributed.rank()))
        norm = None
        window_loss = torch.zeros_like(self.totals.loss)
        for batch in window:
            loss = engine.loss(batch.model_inputs(engine.device, engine.dtype))
            engine.backward(loss * scale.to(loss.dtype))
            window_loss += loss.detach()
            norm = engine.step(learning_rate, measure and batch is window[-1])
        if engine.skipped:
            self.skip(window, learning_rate, window_loss.item())
        else:
            self.bad_in_a_row = 0
            self.totals.loss += window_loss
            self.totals.counts += counts
        return norm, Wishes(*wishes.numbers())

    def own_wishes(self) -> torch.Tensor:
        """What this rank would have all ranks do after this step; summed, the fields of Wishes."""
        due = distributed.is_main() and time.monotonic() - self.saved > self.save_seconds
        stop = self.stop.received
        known = (due, self.validation.scored, self.checkpoints.written, *(stop == number.name for number in STOPPING))
        return torch.tensor(known, dtype=torch.float64)

    def skip(self, window: list[Batch], learning_rate: float, loss: float) -> None:
        """Notes a step that was skipped, and its images; ends the run when there are too many in a row. Collective.

        In fp16 a gradient that overflows is how the loss scale is found, and nobody's fault while the loss is finite.
        """
        self.bad_in_a_row += 1
        losses = distributed.gather(loss)
        ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        listing = self.run_dir / "bad_steps.jsonl"
        if ranks or self.engine.precision != "fp16":
            self.state.bad_steps += 1
            names = distributed.gather([name for batch in window for name in batch.names])
            if distributed.is_main():
                images = {rank: names[rank] for rank in ranks or range(len(names))}
                self.write_bad_step(listing, images, learning_rate, losses)
        if self.bad_in_a_row < self.max_bad_steps and not self.engine.scale_exhausted:
            return
        self.finish_save()
        where = self.engine.find_non_finite(b.model_inputs(self.engine.device, self.engine.dtype) for b in window)
        places = [f"rank {rank}: {place}" for rank, place in enumerate(distributed.gather(where)) if place]
        scale = "" if self.engine.loss_scale is None else f", loss scale {self.engine.loss_scale:g}"
        raise UserError(
            f"{self.bad_in_a_row} steps in a row with a loss or gradient that is not finite (run.max_bad_steps is "
            f"{self.max_bad_steps}), the last is step {self.state.global_step + 1}; first met at "
            f"{'; '.join(places) or 'no place that could be found again'}; learning rate {learning_rate:g}{scale}; the "
            f"images are in {listing}, and the checkpoints hold no such step"
        )

    def write_bad_step(
        self, listing: Path, images: dict[int, list[str]], learning_rate: float, losses: list[float]
    ) -> None:
        """`images`: of each rank that the step went wrong on."""
        step = self.state.global_step
        what = "loss" if not all(map(math.isfinite, losses)) else "gradient"
        line = {
            "step": step + 1,
            "not_finite": what,
            "losses": [loss if math.isfinite(loss) else str(loss) for loss in losses],
            "lr": learning_rate,
            "loss_scale": self.engine.loss_scale,
            "images": images,
        }
        with listing.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.monitor.say(f"step {step + 1} is skipped, its {what} is not finite; its images are in {listing}")

    def open_epoch(self) -> None:
        plan = self.plan
        epoch, done = divmod(self.state.global_step, plan.epoch_steps)
        steps = min(plan.epoch_steps, plan.total_steps - epoch * plan.epoch_steps)
        self.monitor.start_epoch(epoch, plan.epochs, steps, done)
        self.totals = Totals(self.engine.device)

    def log(self, learning_rate: float, norm: float | None) -> None:
        """Writes what happened since the last log line. Collective."""
        totals, step, engine = self.totals, self.state.global_step, self.engine
        loss = distributed.sum_over_ranks(totals.loss).item()
        labels, images, captions, errors = totals.counts.tolist()
        seconds = time.perf_counter() - totals.started
        values: dict[str, float | None] = {
            "loss": loss / labels if labels else None,  # none: all of the steps were skipped
            "lr": learning_rate,
            "grad_norm": norm,
            "images_per_s": images / seconds,
            "captions_per_s": captions / seconds,
            "data_wait": totals.waited / seconds,
        }
        if engine.device.type == "cuda":
            values["device_memory_gb"] = engine.peak_memory() / 1e9
        if engine.loss_scale is not None:
            values |= {"loss_scale": engine.loss_scale, "skipped_steps": engine.skipped_steps}
        self.monitor.train(step, self.plan.epoch_of(step), values)
        self.shown = {
            "loss": f"{values['loss']:.4f}" if labels else "-",
            "lr": f"{learning_rate:.2e}",
            "img/s": f"{values['images_per_s']:.1f}",
            "cap/s": f"{values['captions_per_s']:.1f}",
            "wait": f"{values['data_wait']:.0%}",
        }
        self.totals = Totals(engine.device)
        if errors:
            self.report_bad_images(self.bad_images)

    def report_bad_images(self, mine: list[str]) -> None:
        """Names unreadable images, and ends the run when they are too many. Collective."""
        errors = sorted({error for share in distributed.gather(mine) for error in share})
        listing = self.run_dir / "bad_images.txt"
        if distributed.is_main():
            known = set(listing.read_text().splitlines()) if listing.exists() else set()
            new = [error for error in errors if error not in known]
            listing.write_text("".join(f"{error}\n" for error in sorted(known | set(errors))))
            for error in new[:3]:
                self.monitor.say(f"skipped: {error}")
            if new[3:]:
                self.monitor.say(f"skipped: {len(new) - 3} more unreadable images, listed in {listing}")
        if len(errors) > self.max_bad_images:
            self.finish_save()
            raise UserError(
                f"{len(errors)} images cannot be read, more than run.max_bad_images ({self.max_bad_images}); "
                f"they are listed in {listing}"
            )

    def validate(self) -> bool:
        """Captions the validation splits and has them scored beside the next steps; whether they are. Collective."""
        started = time.perf_counter()
        errors = self.validation.caption()
        if errors:
            self.report_bad_images(errors)
        if self.validation.has_references:
            self.wait_for_scores(may_stop=False)  # of the validation before, where it scores slower than it trains
            self.validation.start_scoring()
        self.off_the_clock(started)
        return self.validation.has_references

    def take_scores(self) -> None:
        """Collective."""
        self.finish_save()  # the candidate may still be being written
        started = time.perf_counter()
        self.validation.take_scores()
        self.off_the_clock(started)

    def wait_for_scores(self, may_stop: bool) -> None:
        """Waits for the scores that are still to come, if any. Collective, and no single call of it waits long.

        Raises Stopped when a rank is told to stop meanwhile and `may_stop`: the captions are scored after the resume.
        """
        while self.state.awaited_step is not None:
            wishes = Wishes(*distributed.sum_over_ranks(self.own_wishes().to(self.engine.device)).tolist())
            if wishes.scored:
                self.take_scores()
            elif wishes.stop and may_stop:
                raise self.stopped(wishes)
            else:
                time.sleep(0.1)

    def save(self, best: bool) -> None:
        """Saves where the run stands, or begins to (run.async_save). Collective."""
        self.finish_save()
        self.monitor.flush()
        shape = shape_of(self.engine, self.loader.global_batch)
        started = time.perf_counter()
        failure = self.checkpoints.begin(self.engine, asdict(self.state), shape, best)
        self.save_cost = self.off_the_clock(started)
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
        self.save_cost += self.off_the_clock(started)
        if failure is None:
            self.monitor.checkpoint(step, self.save_cost)
        else:
            self.report_unsaved(step, failure)

    def off_the_clock(self, started: float) -> float:
        """The seconds since `started`, which the rates in the next log line leave out."""
        seconds = time.perf_counter() - started
        self.totals.started += seconds
        return seconds

    def report_unsaved(self, step: int, failure: str) -> None:
        """A full disk costs the checkpoint and no more; only after the last step it is an error."""
        line = f"no checkpoint after step {step}: {failure}"
        if step == self.plan.total_steps:
            raise UserError(f"{line}; make room and go on with --resume {self.run_dir}")
        self.monitor.say(f"{line}; the run goes on, and the earlier checkpoints are as they were")

    def close(self) -> None:
        """Lets go of the engine's memory. Collective."""
        self.monitor.close()
        self.engine.close()
