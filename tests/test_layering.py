"""The floors of the package, read from its imports; and the top level of the repository."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "blipds"
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


def room_of(module: str) -> str:
    """The room of a dotted name: a folder of blipds/, or a file beside the folders."""
    return module.split(".")[1]


def arrows() -> dict[str, set[str]]:
    """room -> the rooms that its files import; `blipds` itself (its version) is none."""
    found: dict[str, set[str]] = {}
    for path in MODULES:
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        names = [name for name, _ in imports_of(path) if within(name, "blipds") and name.count(".")]
        found.setdefault(room, set()).update({room_of(name) for name in names if exists(name)} - {room})
    return found


def exists(name: str) -> bool:
    """Whether a dotted name leads into a room: `from blipds import __version__` does not."""
    place = PACKAGE / room_of(name)
    return place.is_dir() or place.with_suffix(".py").is_file()


def floors(below: dict[str, set[str]]) -> list[set[str]]:
    """Rooms by floor, lowest first: each stands right above the highest that it imports. AssertionError: a circle."""
    found: list[set[str]] = []
    rest = dict(below)
    while rest:
        floor = {room for room, wanted in rest.items() if not wanted & rest.keys()}
        assert floor, f"these rooms import each other in a circle: {sorted(rest)}"
        found.append(floor)
        rest = {room: wanted for room, wanted in rest.items() if room not in floor}
    return found


def test_reads_imports():
    source = "import a.b\nfrom c import d, e\ndef f():\n    import g\nclass H:\n    if i:\n        from j import k\n"
    assert list(imports(ast.parse(source))) == [
        ("a.b", False),
        ("c.d", False),
        ("c.e", False),
        ("g", True),
        ("j.k", False),
    ]


def test_finds_floors_and_circles():
    assert floors({"a": set(), "b": {"a"}, "c": {"a", "b"}, "d": {"a"}}) == [{"a"}, {"b", "d"}, {"c"}]
    with pytest.raises(AssertionError, match=r"circle: \['a', 'b'\]"):
        floors({"a": {"b"}, "b": {"a"}, "c": set()})


def test_each_folder_stands_above_all_that_it_imports():
    house = floors(arrows())
    for number, rooms in enumerate(house, start=1):
        print(f"floor {number}: {', '.join(sorted(rooms))}")
    where = {room: number for number, rooms in enumerate(house) for room in rooms}
    assert where["errors"] == 0
    assert where["config"] < where["models"] < where["engine"] < where["training"]


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
