"""The floors of the package, read from its imports; and the top level of the repository."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "blipds"
FLOORS = (
    {
        "__init__",
        "errors",
        "registry",
        "config",
        "ds_config",
        "ds_schema",
        "distributed",
        "download",
        "signals",
        "archives",
    },
    {"models", "data", "metrics", "schedules", "monitor"},
    {"engine", "weights", "report"},
    {
        "trainer",
        "validation",
        "run_state",
        "evaluator",
        "scoring",
        "published",
        "captioner",
        "captioning",
        "caption_files",
        "attention",
        "preparation",
        "planner",
        "preflight",
        "image_embeds",
    },
    {"building", "cli"},
)
HEAVY = ("deepspeed", "pycocoevalcap", "tensorboard", "torch.utils.tensorboard")
TOP_LEVEL = {
    *("blipds", "ds_configs", "run_configs", "launch", "tests"),
    *("setup.cfg", "README.md", "LICENSE", "pyproject.toml"),
}

MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "launch").glob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(node: ast.AST, deferred: bool = False) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it is imported only when a function runs); `from a import b` gives a.b."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, deferred) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import"
            yield from ((f"{child.module}.{alias.name}", deferred) for alias in child.names)
        else:
            yield from imports(child, deferred or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def imports_of(path: Path) -> list[tuple[str, bool]]:
    return list(imports(ast.parse(path.read_text(encoding="utf-8"))))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def floor(room: str) -> int:
    found = [number for number, rooms in enumerate(FLOORS, start=1) if room in rooms]
    assert found, f"blipds/{room} is on no floor of design.md"
    return found[0]


def folder(room: str) -> str:
    return room if (PACKAGE / room).is_dir() else "blipds"


def test_reads_imports():
    source = "import a.b\nfrom c import d, e\ndef f():\n    import g\nclass H:\n    if i:\n        from j import k\n"
    assert list(imports(ast.parse(source))) == [
        ("a.b", False),
        ("c.d", False),
        ("c.e", False),
        ("g", True),
        ("j.k", False),
    ]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_come_from_lower_floors_or_the_same_folder(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    targets = {f"{name}.__init__".split(".")[1] for name, _ in imports_of(path) if within(name, "blipds")}
    for target in targets:
        beside = floor(target) == floor(room) and folder(target) == folder(room)
        assert floor(target) < floor(room) or beside, f"blipds/{room} imports blipds.{target}"


def test_data_and_models_do_not_know_each_other():
    for room, other in (("data", "models"), ("models", "data")):
        for path in sorted((PACKAGE / room).rglob("*.py")):
            assert not [name for name, _ in imports_of(path) if within(name, f"blipds.{other}")], path


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=name_of)
def test_only_the_engine_imports_deepspeed(path):
    if PACKAGE / "engine" not in path.parents:
        assert not [name for name, _ in imports_of(path) if within(name, "deepspeed")]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_imports_wait_until_they_are_used(path):
    assert not [name for name, deferred in imports_of(path) if not deferred and any(within(name, h) for h in HEAVY)]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_package_does_not_import_its_command_lines(path):
    assert not [name for name, _ in imports_of(path) if within(name, "launch")]


def test_top_level_holds_nothing_else():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    entries = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert {entry for entry in entries if not entry.startswith(".")} <= TOP_LEVEL
