"""bash tests/gpu.sh: what is found is kept whatever comes later; and, where there is a GPU, what it finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import REPOSITORY
from on_gpu.engine import Plan
from on_gpu.run import run_boxed, run_sections

from blipds.planning.planner import GB, ModelStates

ROW = {"benchmark": "b", "what": "w", "ours": "1", "against": "2", "ratio": None, "goal": None, "details": {}}


def test_what_was_found_is_kept_when_a_later_section_fails(tmp_path):
    def box(name):
        found = {"a": [ROW], "b": [ROW | {"details": {"good": False}}], "c": [ROW], "d": []}[name]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        kept = json.loads((tmp_path / "report.json").read_text())["sections"] if name > "a" else {}
        assert list(kept) == list("abcd"[: "abcd".index(name)])
        return "failed with status 1" if name == "c" else ""

    report = run_sections(list("abcd"), tmp_path, box, {"date": "today"})
    problems = {name: section["problem"] for name, section in report.items()}
    assert problems == {"a": "", "b": "wrong: w", "c": "failed with status 1", "d": "nothing found"}
    assert json.loads((tmp_path / "report.json").read_text())["sections"]["c"]["rows"] == [ROW]


def test_a_section_is_ended_after_its_time_with_all_that_it_started(tmp_path):
    child = f"import subprocess, time; subprocess.Popen(['sleep', '60']); open({str(tmp_path / 'up')!r}, 'w'); "
    command = [sys.executable, "-c", child + "time.sleep(60)"]
    assert run_boxed(command, 2, os.environ) == "ended after its 2 s"
    assert (tmp_path / "up").exists()
    assert run_boxed([sys.executable, "-c", "exit(3)"], 60, os.environ) == "failed with status 3"
    assert run_boxed([sys.executable, "-c", "pass"], 60, os.environ) == ""


def test_the_planned_batch():
    """In GB: parameters 1, optimizer 2, buffers 0.5; 0.5 and 0.25 an image, with 7 % on top; 1.4 are reserved."""
    plan = Plan(ModelStates(1 * GB, 0, 2 * GB, 0.5 * GB, 0), fixed=0.5 * GB, per_image=0.25 * GB)
    assert plan.largest(8 * GB) == int((8 - 1.4 - 3.5 - 0.535) / 0.2675) == 9
    assert plan.tensors(10) == 6.5 * GB
    assert plan.largest(5 * GB) == 0


@pytest.mark.gpu
def test_all_that_a_gpu_computes_is_right(tmp_path):
    script = [REPOSITORY / "tests" / "gpu.sh", "a", "b", "--output", tmp_path]
    process = subprocess.run(["bash", *script], env=os.environ | {"PYTHON": sys.executable})
    report = json.loads(Path(tmp_path / "report.json").read_text())
    assert process.returncode == 0, {name: found["problem"] for name, found in report["sections"].items()}
