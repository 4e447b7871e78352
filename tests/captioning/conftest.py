"""The oracle's checkpoint, photographs and words, and launch/caption.py run in this process."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import load_script

from blipds import distributed

Command = Callable[..., str]
PHOTOGRAPHS = 16


@pytest.fixture
def caption(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """caption(image, ..., "--output", ...) runs the command in this process; returns what it printed, stdout first."""
    script = load_script("caption")
    monkeypatch.setattr(distributed, "initialise", lambda: torch.device("cpu"))

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["caption.py", *map(str, arguments), "--num-workers", "0"])
        script.main(script.parse_arguments())
        return "".join(capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def golden(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "oracle" / "golden.json").read_text())["generate"]


@pytest.fixture(scope="session")
def photographs(shared: Path, golden: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to the oracle's photographs, half of them one folder further down."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "below").mkdir()
    for number, name in enumerate(golden["images"][:PHOTOGRAPHS]):
        (folder / ("below" if number % 2 else "") / name).symlink_to(shared / "data" / "flickr8k" / "images" / name)
    return folder


@pytest.fixture(scope="session")
def oracle(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The arguments that name the oracle's checkpoint and its geometry."""
    config = {
        "model": {
            "vit_kwargs": {"embed_dim": 96, "depth": 4, "num_heads": 4},
            "image_size": 96,
            "med_config_path": str(shared / "oracle" / "med_config.json"),
        },
        "datasets": {"flickr8k_caption": {}},
    }
    path = tmp_path_factory.mktemp("oracle") / "oracle.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--checkpoint", shared / "oracle" / "tiny_blip.pth", "--cfg-path", path]
