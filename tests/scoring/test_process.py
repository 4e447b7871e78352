"""Scoring in a process of its own: the same scores, and what becomes of it when processes die."""

import signal
import subprocess
import sys
import time

import psutil
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from blipds.scoring.process import Scoring, ScoringTask

# already tokens, so that pycocoevalcap can be asked about them as they are
REFERENCES = {"a": ["a dog runs on the grass", "a brown dog"], "b": ["two cats sleep", "cats on a sofa"]}
CANDIDATES = {"a": "a dog runs", "b": "two cats on a sofa"}
QUICK = ["Bleu", "CIDEr"]  # without METEOR, whose Java takes seconds to load


def theirs(references):
    candidates = {image_id: [text] for image_id, text in CANDIDATES.items()}
    bleu, _ = Bleu(4).compute_score(references, candidates, verbose=0)
    values = {f"Bleu_{n}": value for n, value in enumerate(bleu, start=1)}
    return values | {"CIDEr": Cider().compute_score(references, candidates)[0]}


def test_scores_are_those_of_pycocoevalcap():
    (scores,) = Scoring([ScoringTask(CANDIDATES, REFERENCES, QUICK)]).scores()
    expected = theirs(REFERENCES)
    assert scores.missing == {}
    assert {name: scores.values[name] for name in expected} == expected


def test_several_tasks_keep_their_order():
    tasks = [ScoringTask({k: v}, {k: REFERENCES[k]}, ["ROUGE_L"]) for k, v in (("a", "a brown dog"), ("b", "nothing"))]
    assert [scores.values["ROUGE_L"] for scores in Scoring(tasks).scores()] == [1.0, 0.0]


def test_a_scoring_that_is_killed_is_missing_scores_and_no_more():
    scoring = Scoring([ScoringTask(CANDIDATES, REFERENCES, ["METEOR"])])
    scoring._process.kill()
    (scores,) = scoring.scores()
    assert scoring.done()
    assert scores.values == {} and scores.missing == {"METEOR": "the scoring process ended with status -9"}


def test_a_signal_to_the_whole_process_group_does_not_end_it():
    scoring = Scoring([ScoringTask(CANDIDATES, REFERENCES, QUICK)])
    process = psutil.Process(scoring._process.pid)
    while not (java := process.children()):
        time.sleep(0.001)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for each in (process, *java):
            each.send_signal(number)
    (scores,) = scoring.scores()
    assert scores.missing == {} and {"Bleu_4", "CIDEr"} <= set(scores.values)


def test_what_the_user_got_wrong_is_the_reason():
    (scores,) = Scoring([ScoringTask({"a": "x"}, {"b": ["y"]}, QUICK)]).scores()
    assert set(scores.missing) == set(QUICK)
    assert scores.missing["CIDEr"].endswith("candidate captions without a reference: 1 images (a)")


def test_it_ends_with_the_rank_that_started_it():
    code = f"""
import os, signal
from blipds.scoring.process import Scoring, ScoringTask
scoring = Scoring([ScoringTask({CANDIDATES}, {REFERENCES}, ["METEOR"] * 20)])
print(scoring._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    deadline = time.monotonic() + 120
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)
