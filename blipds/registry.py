"""Names that a config may use, and what they stand for."""

from collections.abc import Callable
from typing import Any, TypeVar

from blipds.errors import UserError, nearest

T = TypeVar("T", bound=Callable[..., Any])


class Registry:
    """Maps names to classes or functions; `kind` is what the error line calls them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
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
        if name not in self._entries:
            raise UserError(f"unknown {self.kind} '{name}'; {nearest(name, self._entries)}")
        return self._entries[name]

    def names(self) -> list[str]:
        return sorted(self._entries)


MODELS = Registry("model arch")
DATASETS = Registry("dataset")
PROCESSORS = Registry("processor")
SCHEDULES = Registry("lr_sched")
OBJECTIVES = Registry("objective")
