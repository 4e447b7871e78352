"""What `pip install` of a built sdist and wheel brings, in a new environment and an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
from launching import REPOSITORY
from PIL import Image

PARTS = ("blipds", "launch", "run_configs", "ds_configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
COMMANDS = ("finetune", "evaluate", "caption", "export", "plan", "report", "preflight", "prepare-data")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """run(command, *arguments) of an environment that has the wheel; the wheel is built from the sdist."""
    folder = tmp_path_factory.mktemp("installed")
    source, built, environment, empty = (folder / name for name in ("source", "built", "environment", "empty"))
    for part in (REPOSITORY / name for name in PARTS):
        if part.is_dir():
            shutil.copytree(part, source / part.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(part, source)
    built.mkdir()
    empty.mkdir()
    python([sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(built)!r})"], source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    (sdist,) = built.glob("*.tar.gz")
    python([*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", built, sdist], empty)
    python([sys.executable, "-m", "venv", "--without-pip", environment], empty)
    scripts = environment / "bin"
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch and the others, not blipds
    (wheel,) = built.glob("*.whl")
    python([*pip, "--python", scripts / "python", "install", "--no-deps", "--no-index", wheel], empty)

    def run(command, *arguments, **variables):
        return python([scripts / command, *arguments], empty, **variables)

    run.site, run.folder = site, empty
    return run


def python(words, folder, **variables):
    """What it printed; no repository is on the path."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    outside |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(list(map(str, words)), cwd=folder, env=outside, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_all_of_the_package_is_installed(installed):
    found = installed.site / "blipds"
    for folder in ("blipds", "launch", "run_configs", "ds_configs"):
        there = found if folder == "blipds" else found / folder
        for path in (REPOSITORY / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".pyc", ".sh", ".sbatch", ".md"):
                assert (there / path.relative_to(REPOSITORY / folder)).is_file(), path


def test_train_caption_and_report_from_an_empty_folder(installed):
    sizes = "datasets.shapes_caption.num_images={train: 8, val: 2, test: 2}"
    small = ["run.max_iters=2", "run.batch_size_train=4", "run.report_metric=false", "run.valid_splits=[]"]
    options = [sizes, "datasets.shapes_caption.captions_per_image=all", *small, "run.job_id=first"]
    printed = installed("blipds-finetune", "--cfg-path", "shapes_tiny", "--ds-config", "zero2", "--options", *options)
    assert "; 2 steps in 1 epochs" in printed and "warn" not in printed.lower()  # what libraries say is in log.txt
    run_dir = installed.folder / "output" / "shapes_tiny" / "first"
    Image.new("RGB", (64, 64), "red").save(installed.folder / "red.png")
    printed = installed("blipds-caption", "red.png", "--checkpoint", run_dir)
    assert '{"image": "red.png", "caption": ' in printed
    (run_dir / "report.html").unlink()
    installed("blipds-report", run_dir)
    assert (run_dir / "report.html").stat().st_size > 10_000
