"""What a person watches: the progress bar, `metrics.jsonl`, sheets of captioned images, and `run.trackers`."""

import json
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from blipds.files.replacing import replace_text
from blipds.trackers import TRACKERS, Tracker

QUIET_SECONDS = 30.0  # between progress lines where no terminal can redraw a bar

Values = Mapping[str, float | None]


class Monitor:
    """Rank 0's monitor, writing below `run_dir`.

    With `resume_step` (the last step the checkpoint holds) what the run before wrote beyond it is dropped, from
    `metrics.jsonl` and from TensorBoard's curves: those steps are repeated. The scores of `awaited_step` are dropped
    too, since they are computed again. `trackers` get curves, captions and `config`; one that fails is left out from
    then on.
    """

    def __init__(
        self,
        run_dir: Path,
        resume_step: int | None = None,
        awaited_step: int | None = None,
        trackers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        metrics = run_dir / "metrics.jsonl"
        if resume_step is not None and metrics.exists():
            _drop_lines(metrics, resume_step, awaited_step)
        self._lines = metrics.open("a", encoding="utf-8", buffering=1)  # flushed at the end of every line
        self._bar: tqdm | None = None
        self._trackers: dict[str, Tracker] = {}
        for name in trackers:
            with self._left_out_if_it_fails(name):
                self._trackers[name] = TRACKERS[name](run_dir, resume_step, config or {})

    def start_epoch(self, epoch: int, max_epoch: int, steps: int, done: int = 0) -> None:
        """Opens the progress bar of an epoch of `steps` optimiser steps, `done` of them before a resume."""
        self._close_bar()
        terminal = sys.stderr.isatty()
        columns, rows = shutil.get_terminal_size()  # 80 x 24 for a terminal that says 0 x 0: tqdm would show nothing
        self._bar = tqdm(
            desc=f"epoch {epoch + 1}/{max_epoch}",
            total=steps,
            initial=done,
            unit="step",
            file=sys.stderr if terminal else _LineByLine(),
            bar_format=None if terminal else "{desc} step {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            ncols=columns if terminal else None,
            nrows=rows if terminal else None,
            mininterval=0.5 if terminal else QUIET_SECONDS,
            maxinterval=math.inf,  # tqdm's own thread would print more often
            miniters=1,
        )

    def advance(self, done: int, postfix: Mapping[str, Any]) -> None:
        """`done` steps of this epoch are finished; the bar ends in `postfix` (loss, lr, ...)."""
        assert self._bar is not None, "advance() before start_epoch()"
        self._bar.set_postfix(postfix, refresh=False)
        if done < self._bar.total:
            self._bar.update(done - self._bar.n)
        else:  # closing draws the last line
            self._bar.n = done
            self._close_bar()

    def start(self, step: int, facts: Mapping[str, Any]) -> None:
        """Logs that a run starts or resumes after `step`, with `facts` about it: a line of kind "start"."""
        self._log("start", {"kind": "start", "step": step}, {}, facts)

    def train(self, step: int, epoch: int, values: Values) -> None:
        """Logs a training step: `values` under `train/` in TensorBoard, and a line of kind "train"."""
        self._log("train", {"kind": "train", "step": step, "epoch": epoch}, values)

    def examples(self, step: int, images: Sequence[Mapping[str, Any]]) -> None:
        """Logs what a step learnt from a few images: a line of kind "examples"."""
        self._log("examples", {"kind": "examples", "step": step}, {}, {"images": images})

    def evaluation(
        self,
        split: str,
        epoch: int | None,
        step: int,
        values: Values,
        missing: Mapping[str, str],
        note: str = "",
        seconds: Mapping[str, float] | None = None,
        unscored: str = "",
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Logs an evaluation: `values` under `{split}/`, a line of kind "eval", and a line for the terminal.

        `epoch` is None outside of training. `missing` says why a metric has no value, `unscored` why nothing was to be
        scored. `note`: which weights and precision were used. `seconds`: what "generation", "tokenization" and each
        metric took. `settings`: what to know of a metric's number.
        """
        head = {"kind": "eval", "split": split, "epoch": epoch, "step": step}
        costs = {name: round(value, 2) for name, value in (seconds or {}).items()}
        tail = {"missing": dict(missing), "note": note, "seconds": costs}
        self._log(split, head, values, tail | ({"settings": settings} if settings else {}))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
        when = "" if epoch is None else f" at step {step} (epoch {epoch + 1})"
        shown = shown or ", ".join(filter(None, ["captions only", unscored]))
        self.say(f"{split}{when}: {shown}{f'  [{note}]' if note else ''}")
        for name, reason in missing.items():
            self.say(f"  {name} is missing: {reason}")

    def checkpoint(self, step: int, seconds: float) -> None:
        """Logs what a checkpoint cost the run: `save/seconds` in TensorBoard, and a line of kind "save"."""
        self._log("save", {"kind": "save", "step": step}, {"seconds": seconds})

    def captions(
        self,
        split: str,
        step: int,
        images: Sequence[Image.Image],
        captions: Sequence[str],
        references: Sequence[Sequence[str]],
    ) -> None:
        """Saves a contact sheet as `samples/{split}_step{step}.png`, and shows the captions in the trackers."""
        sheet = contact_sheet(images, captions, references)
        path = self.run_dir / "samples" / f"{split}_step{step}.png"
        path.parent.mkdir(exist_ok=True)
        sheet.save(path)
        rows = list(zip(images, captions, references, strict=True))
        self._track(lambda tracker: tracker.captions(step, split, rows, sheet))

    def say(self, line: str) -> None:
        """Prints a line above the progress bar."""
        tqdm.write(line)
        sys.stdout.flush()

    def say_where(self) -> None:
        """Says where the trackers show this run."""
        for tracker in self._trackers.values():
            self.say(f"watch      {tracker.where}")

    def flush(self) -> None:
        """Brings the trackers up to date before a checkpoint is written."""
        self._track(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Closes the bar and the files; may be called twice."""
        self._close_bar()
        self._lines.close()
        self._track(lambda tracker: tracker.close())
        self._trackers = {}

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _log(self, section: str, head: dict[str, Any], values: Values, tail: Mapping[str, Any] | None = None) -> None:
        """JSON has no NaN and no infinity: they become null, and `not_finite` says which of them it was.

        `time` is the clock's, in seconds since 1970.
        """
        numbers = {name: _plain(value) for name, value in values.items()}
        not_finite = {name: str(n) for name, n in numbers.items() if n is not None and not math.isfinite(n)}
        line = head | numbers | dict.fromkeys(not_finite) | dict(tail or {})
        if not_finite:
            line["not_finite"] = not_finite
        line["time"] = round(time.time(), 1)
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        scalars = {f"{section}/{name}": number for name, number in numbers.items() if number is not None}
        if scalars:
            self._track(lambda tracker: tracker.scalars(head["step"], scalars))

    def _track(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._left_out_if_it_fails(name):
                call(tracker)

    @contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        """A run never stops because of a tracker."""
        try:
            yield
        except Exception as error:
            self._trackers.pop(name, None)
            reason = " ".join(str(error).split())
            self.say(f"{name} fails, and the run goes on without it: {type(error).__name__}: {reason}")


def _nothing(*args: Any, **kwargs: Any) -> None: ...


class NullMonitor(Monitor):
    """What ranks other than 0 hold: every method of Monitor, doing nothing."""

    __init__ = start_epoch = advance = start = train = examples = evaluation = checkpoint = captions = _nothing
    say = say_where = flush = close = _nothing


def _plain(value: Any) -> float | int | None:
    """A Python number from one of numpy or a tensor."""
    return value if value is None or isinstance(value, int) else float(value)


def _drop_lines(metrics: Path, after: int, awaited: int | None) -> None:
    """Drops lines after a step, those of an evaluation that is scored again, and a line that a crash cut off."""
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["step"] <= after and not (entry["kind"] == "eval" and entry["step"] == awaited):
            kept.append(line + "\n")
    replace_text(metrics, "".join(kept))


class _LineByLine:
    """For a stderr that is a file or a pipe: tqdm's updates become lines."""

    def write(self, text: str) -> None:
        if text := text.strip():
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


# --- contact sheet

CELL, MARGIN, FONT_SIZE, LINE_HEIGHT = 320, 12, 15, 19
PHOTO_HEIGHT = 240
CHARACTERS = 40  # a line of text; the built-in font is about 7 pixels wide at this size


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], references: Sequence[Sequence[str]], columns: int = 4
) -> Image.Image:
    """Images in a grid; below each its generated caption, and two references in grey."""
    assert len(images) == len(captions) == len(references) > 0
    font = ImageFont.load_default(size=FONT_SIZE)
    texts = []
    for caption, few in zip(captions, references, strict=True):
        lines = [(line, "black") for line in _wrapped(caption or "(empty)")]
        texts.append(lines + [(line, "dimgrey") for text in few[:2] for line in _wrapped(text, "- ")])
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    row_height = PHOTO_HEIGHT + 3 * MARGIN + LINE_HEIGHT * max(map(len, texts))
    sheet = Image.new("RGB", (columns * (CELL + MARGIN) + MARGIN, rows * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (image, lines) in enumerate(zip(images, texts, strict=True)):
        left = MARGIN + place % columns * (CELL + MARGIN)
        top = MARGIN + place // columns * row_height
        photo = image.convert("RGB")
        scale = min(CELL / photo.width, PHOTO_HEIGHT / photo.height)
        photo = photo.resize((max(1, round(photo.width * scale)), max(1, round(photo.height * scale))))
        sheet.paste(photo, (left + (CELL - photo.width) // 2, top + (PHOTO_HEIGHT - photo.height) // 2))
        for number, (line, colour) in enumerate(lines):
            y = top + PHOTO_HEIGHT + MARGIN + number * LINE_HEIGHT
            draw.text((left, y), line, fill=colour, font=font)
    return sheet


def _wrapped(text: str, bullet: str = "") -> list[str]:
    """At most four lines."""
    return textwrap.wrap(
        text, CHARACTERS, initial_indent=bullet, subsequent_indent=" " * len(bullet), max_lines=4, placeholder=" ..."
    )
