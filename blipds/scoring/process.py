"""Scoring in a process of its own, while training continues: CIDEr and BLEU are pure Python, METEOR is Java.

`python -m blipds.scoring.process` is that process: it reads tasks as JSON from standard input and writes their
scores to standard output.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from blipds.scoring.metrics import METRICS, Scores, score_captions
from blipds.signals import leave_signals_alone

NICENESS = 10  # training goes first


@dataclass
class ScoringTask:
    """Arguments of `metrics.score_captions`. `known`: scores that need no such process, added to what it finds."""

    candidates: dict[str, str]
    references: dict[str, list[str]]
    metrics: Sequence[str] = METRICS
    cider_corpus: Mapping[str, list[str]] = field(default_factory=dict)
    known: Scores = field(default_factory=Scores)

    def arguments(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "known"}


class Scoring:
    """Scores tasks one after the other in a low-priority process, which ends when this one does.

    Questions and answers are files, so that neither side ever waits for the other to read.
    """

    def __init__(self, tasks: Sequence[ScoringTask]) -> None:
        self.tasks = tasks
        self._answers, self._complaints = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        with tempfile.TemporaryFile("w+") as questions:
            json.dump([task.arguments() for task in tasks], questions)
            questions.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "blipds.scoring.process", str(os.getpid())],
                stdin=questions,
                stdout=self._answers,
                stderr=self._complaints,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def done(self) -> bool:
        return self._process.poll() is not None

    def scores(self) -> list[Scores]:
        """One for each task; waits for them. If the process died, that is the reason why metrics are missing."""
        status = self._process.wait()
        for file in (self._answers, self._complaints):
            file.seek(0)
        if status:
            last = (self._complaints.read().decode(errors="replace").strip().splitlines() or [""])[-1]
            reason = f"the scoring process ended with status {status}{last and ': '}{last}"
            return [Scores(missing=dict.fromkeys(task.metrics, reason)) | task.known for task in self.tasks]
        answers = json.load(self._answers)
        return [Scores(**answer) | task.known for answer, task in zip(answers, self.tasks, strict=True)]


def _end_with(parent: int) -> None:
    """Ends with a rank that is killed; Java ends when its input does."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    leave_signals_alone(0)  # one to the whole process group is for the rank, which may go on until it has saved
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    json.dump([asdict(score_captions(**task)) for task in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
