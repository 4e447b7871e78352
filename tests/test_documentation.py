"""The README files: what they point to exists, every key is explained, and they stay short."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path

import pytest

from blipds.config.sections import DatasetConfig, EnvConfig, RunConfig
from blipds.models.blip.config import BlipConfig

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".github", "blipds", "ds_configs", "launch", "run_configs", "tests")
PAGES = sorted([ROOT / "README.md", *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])

FENCE = re.compile(r"^```.*?^```", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
IN_REPOSITORY = re.compile(r"(?<![\w./-])(?:blipds|ds_configs|launch|run_configs|tests)/[\w./*-]*\w")
SCRIPT = re.compile(r"(?:launch|tests|tests/benchmarks|tests/report)/[a-z_*]+\.(?:py|sh|sbatch)\b")
# What a shell script hands its arguments to; the others take none of ours.
BEHIND = {
    **dict.fromkeys(["launch/train_*.sh", "launch/slurm.sbatch"], "launch/finetune.py"),
    **{f"launch/{path.name}": "launch/finetune.py" for path in (ROOT / "launch").glob("train_*.sh")},
    "tests/benchmarks/run.sh": "tests/benchmarks/run.py",
}
SETTING = re.compile(r"(?<![\w./-])(model|run|env)\.([a-z_]\w*)")
NO_SETTINGS = {"run": {"sh", "py"}, "model": {"safetensors"}, "env": set()}
SECTIONS = {"model": BlipConfig, "run": RunConfig, "env": EnvConfig}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings: lower case, hyphens for spaces, letters, digits and underscores kept."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def commands(text: str) -> Iterator[str]:
    """The lines of code blocks, continued ones joined, and what stands between backticks in prose."""
    for block in FENCE.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`]+)`", FENCE.sub("", text))


def options_of(script: Path) -> set[str]:
    """The options that a script adds to its parser, and those of blipds.cli where it uses them."""
    source = script.read_text()
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    added = [call.args for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
    found = {name.value for names in added for name in names if isinstance(name, ast.Constant)}
    return found | (options_of(ROOT / "blipds" / "cli.py") if "cli.add_" in source else set())


def flags(command: str) -> Iterator[tuple[str, str]]:
    """(script, flag) for each flag that a command gives to a script of ours; ` -- ` begins another command."""
    scripts = list(SCRIPT.finditer(command))
    for script, behind in zip_longest(scripts, scripts[1:]):
        given = command[script.end() : behind.start() if behind else None]
        given = re.split(r"\s(?:--\s|#|deepspeed\s)", given)[0]
        yield from ((script.group(), flag) for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", given))


def test_reads_commands():
    text = "a `b --c` d\n```\npython launch/x.py --e \\\n    --f=1 -- python launch/y.py --g  # --h\n```\n"
    assert list(commands(text))[1:] == [
        "python launch/x.py --e      --f=1 -- python launch/y.py --g  # --h",
        "```",
        "b --c",
    ]
    found = [flag for command in commands(text) for flag in flags(command)]
    assert found == [("launch/x.py", "--e"), ("launch/x.py", "--f"), ("launch/y.py", "--g")]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_of_this_repository_exist(page):
    for path in IN_REPOSITORY.findall(page.read_text()):
        assert list(ROOT.glob(path)), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_give_options_that_exist(page):
    for command in commands(page.read_text()):
        for script, flag in flags(command):
            assert flag in options_of(ROOT / BEHIND.get(script, script)), command


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_exist(page):
    for section, key in SETTING.findall(page.read_text()):
        known = {field.name for field in fields(SECTIONS[section])}
        assert key in known | NO_SETTINGS[section], f"{section}.{key}"


@pytest.mark.parametrize("section", [BlipConfig, RunConfig, DatasetConfig], ids=lambda section: section.__name__)
def test_every_key_is_explained(section):
    text = (ROOT / "run_configs" / "README.md").read_text()
    for field in fields(section):
        assert re.search(rf"[`.]{field.name}[`.:]", text), field.name


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_all_pages_together_are_short():
    assert sum(len(page.read_text().split()) for page in PAGES) <= 12_000
