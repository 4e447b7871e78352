"""Proves and measures blipds on a GPU, in sections of limited time. What one found is kept when a later one fails.

    bash tests/gpu.sh                   all of them, below 10 minutes on an H100 or H200
    bash tests/gpu.sh c e               some
    bash tests/gpu.sh --dry             all on the CPU, tiny: so that no time on a GPU goes to mistakes

a   training under ZeRO 0 to 3 in bf16, fp16 and fp32, and offloaded, through the launcher: losses against the CPU's,
    resume, evaluation, Ctrl-C, fp16 from overflow back to training
b   the oracle: what the original code computes, in fp32 within the CPU's tolerances; bf16 beside it
c   the real engine: large at 384, bf16, ZeRO-2, five captions an image, at the largest batch of cards of 16 to 80 GB
d   a training step against transformers' BLIP, one caption an image, bf16
e   beam search against transformers' generate, run.compile against eager, the loader on all cores, profiles

Each row is printed as it is found, and is in FOLDER/<section>.jsonl; FOLDER/report.json has them all. The exit status
is 1 where a section failed, ran out of time, or found something wrong.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from benchmarks.measuring import Row, line_of, machine

PACKAGES = ("torch", "torchvision", "transformers", "timm", "deepspeed")


@dataclass(frozen=True)
class Section:
    """`seconds` on a GPU, `dry_seconds` on a CPU; then it is ended."""

    module: str
    seconds: int
    dry_seconds: int


SECTIONS = {
    "a": Section("on_gpu.training", 210, 240),
    "b": Section("on_gpu.oracle", 50, 60),
    "c": Section("on_gpu.engine", 150, 60),
    "d": Section("on_gpu.pairs", 50, 60),
    "e": Section("on_gpu.generation", 130, 120),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"which: {', '.join(SECTIONS)}")
    parser.add_argument("--output", type=Path, default=Path("output/gpu"), metavar="FOLDER", help="(output/gpu)")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.sections) - SECTIONS.keys():
        parser.error(f"unknown section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if not args.dry and not torch.cuda.is_available():
        parser.error("there is no GPU (torch.cuda.is_available() is false); --dry runs on the CPU")
    return args


def run_here(rows: Iterator[Row], path: Path) -> None:
    """Prints and writes the rows of a section as they come."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            print(line_of(row), flush=True)
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()


def run_boxed(command: list[str], seconds: float, environment: Mapping[str, str]) -> str:
    """Runs a section in a process group of its own; returns what became of it: "", or why it did not end well."""
    process = subprocess.Popen(command, env=dict(environment), start_new_session=True)
    try:
        status = process.wait(seconds)
        return "" if status == 0 else f"failed with status {status}"
    except subprocess.TimeoutExpired:
        return f"ended after its {seconds} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # ranks that it started, too
        process.wait()


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def run_sections(
    names: list[str], folder: Path, box: Callable[[str], str], facts: Mapping[str, object]
) -> dict[str, dict]:
    """Runs `box(section)` for each, and rewrites the report after each one."""
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, dict] = {}
    for name in names:
        (folder / f"{name}.jsonl").unlink(missing_ok=True)
        started = time.perf_counter()
        print(f"== {name}", flush=True)
        problem = box(name)
        rows = rows_of(folder / f"{name}.jsonl")
        wrong = [row["what"] for row in rows if row["details"].get("good") is False]
        problem = problem or ("nothing found" if not rows else f"wrong: {'; '.join(wrong)}" if wrong else "")
        seconds = time.perf_counter() - started
        report[name] = {"problem": problem, "seconds": seconds, "rows": rows}
        print(f"   {seconds:.0f} s{problem and f', {problem}'}", flush=True)
        (folder / "report.json").write_text(json.dumps({**facts, "sections": report}, indent=1) + "\n")
    return report


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def main() -> None:
    args = parse_arguments()
    names = args.sections or list(SECTIONS)
    folder = args.output.resolve()
    if args.child:
        (name,) = names
        module = __import__(SECTIONS[name].module, fromlist=["rows"])
        device = torch.device("cpu" if args.dry else "cuda:0")
        return run_here(module.rows(device, folder / name, args.dry), folder / f"{name}.jsonl")
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if args.dry else {})}

    def box(name: str) -> str:
        section = SECTIONS[name]
        child = [sys.executable, "-m", "on_gpu.run", "--child", name, "--output", str(folder)]
        shutil.rmtree(folder / name, ignore_errors=True)  # of an earlier call
        (folder / name).mkdir()
        seconds = section.dry_seconds if args.dry else section.seconds
        return run_boxed(child + ["--dry"] * args.dry, seconds, environment)

    facts = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "dry": args.dry, "versions": versions()}
    facts["machine"] = found = machine(torch.device("cpu" if args.dry else "cuda"))
    report = run_sections(names, folder, box, facts)
    print("\n" + ", ".join(f"{key} {value}" for key, value in {**found, **versions(), "date": facts["date"]}.items()))
    print("\n| measure | blipds | against | ratio | goal |\n|---|---|---|---|---|")
    for section in report.values():
        for row in section["rows"]:
            print(line_of(Row(**row)))
    print(f"\n{folder / 'report.json'}")
    sys.exit(any(section["problem"] for section in report.values()))


if __name__ == "__main__":
    main()
