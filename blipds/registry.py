"""Names that a config may use, and what they stand for. Plugins add theirs."""

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from blipds.errors import UserError, nearest

T = TypeVar("T", bound=Callable[..., Any])


class Registry:
    """Maps names to classes or functions; `kind` is what the error line calls them.

    builtin: the modules that register this project's own entries, imported when a name is first looked up.
    """

    def __init__(self, kind: str, *builtin: str) -> None:
        self.kind = kind
        self.builtin = builtin
        self._entries: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters a class or function under `name`; a name is taken once."""

        def enter(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} '{name}' is registered twice: {self._entries[name]} and {entry}")
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in self.names():
            raise UserError(f"unknown {self.kind} '{name}'; {nearest(name, self._entries)}")
        return self._entries[name]

    def names(self) -> list[str]:
        for module in self.builtin:
            importlib.import_module(module)
        return sorted(self._entries)

    def descriptions(self) -> dict[str, str]:
        """{name: the first line of the entry's docstring}"""
        return {name: (self._entries[name].__doc__ or "").strip().partition("\n")[0] for name in self.names()}


ARCHS = Registry("model.arch", "blipds.models")
DATASETS = Registry("dataset", "blipds.data")
PROCESSORS = Registry("processor", "blipds.data")
SCHEDULES = Registry("run.lr_sched", "blipds.training.schedules")
OBJECTIVES = Registry("run.objective", "blipds.training.objectives", "blipds.training.self_critical")
