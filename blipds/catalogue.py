"""What there is to choose from, plugins included: `launch/finetune.py --list`."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from blipds.config.run import PACKAGED_DATASETS
from blipds.config.schema import read_yaml
from blipds.registry import ARCHS, DATASETS, OBJECTIVES, PROCESSORS, SCHEDULES
from blipds.scoring.metrics import SCORERS


def catalogue() -> Iterator[str]:
    """Lines: archs with their model types, datasets, processors, schedules, objectives, metrics."""
    yield "archs (model.arch), and under each its model types (model.model_type)"
    for name, what in ARCHS.descriptions().items():
        yield f"  {name:26} {what}"
        for model_type, path in ARCHS[name]().model_types.items():
            yield f"    {model_type:24} {comment(path)}"
            section = read_yaml(path)["model"]
            for key in ("pretrained", "finetuned"):
                if section.get(key):
                    yield f"      {key:22} {section[key]}"
    datasets = DATASETS.descriptions()
    datasets |= {path.stem: comment(path) for path in PACKAGED_DATASETS.glob("*.yaml") if path.stem in datasets}
    yield from section_of("datasets (datasets.<name>)", datasets)
    yield from section_of("processors (vis_processor, text_processor)", PROCESSORS.descriptions())
    yield from section_of("schedules (run.lr_sched)", SCHEDULES.descriptions())
    yield from section_of("objectives (run.objective)", OBJECTIVES.descriptions())
    yield from section_of("metrics (launch/evaluate.py --metrics)", SCORERS.descriptions())


def section_of(title: str, entries: Mapping[str, str]) -> Iterator[str]:
    yield f"\n{title}"
    for name, what in entries.items():
        yield f"  {name:26} {what}"


def comment(path: Path) -> str:
    """What a packaged YAML says of itself in its first line."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
