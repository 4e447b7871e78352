"""What libraries say that is no error (no CUDA found, deprecated calls): in the run's log file, not on the terminal."""

import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path

import torch

from blipds import distributed


class Chatter(logging.Filter):
    """In its context Python's warnings and what loggers write to the terminal go to the log file of the run.

    Records wait in memory until `open` says which run it is. Errors reach the terminal, too. Lines of one rank follow
    each other; those of several ranks share the file.
    """

    def __init__(self) -> None:
        super().__init__()
        self._log = MemoryHandler(sys.maxsize, flushLevel=logging.CRITICAL + 1)
        self._filtered: list[logging.Filterer] = []

    def __enter__(self) -> "Chatter":
        torch.cuda.is_available()  # says on the terminal, once, that a driver does not work
        logging.captureWarnings(True)
        self._watch()
        return self

    def __exit__(self, *error: object) -> None:
        logging.captureWarnings(False)
        for source in self._filtered:
            source.removeFilter(self)
        self._filtered = []
        if self._log.target is not None:
            self._log.target.close()

    def open(self, run_dir: Path) -> None:
        """Writes what has come so far, and from now on each record at once."""
        if self._filtered:
            self._watch()  # loggers of what was imported since
            file = logging.FileHandler(run_dir / "log.txt", encoding="utf-8", delay=True)
            place = f"rank {distributed.rank()} %(levelname)s %(filename)s:%(lineno)d"
            file.setFormatter(logging.Formatter(f"%(asctime)s {place} %(message)s"))
            self._log.setTarget(file)
            self._log.flush()
            self._log.flushLevel = logging.NOTSET

    def unwritten(self) -> str:
        """The lines that no file has, for a failure before there is a run directory."""
        return "".join(f"{record.name}: {record.getMessage()}\n" for record in self._log.buffer)

    def filter(self, record: logging.LogRecord) -> bool:
        self._log.handle(record)
        return record.levelno >= logging.ERROR

    def _watch(self) -> None:
        """DeepSpeed makes its handler when it is imported, so its logger is watched; of others, the handlers."""
        loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
        handlers = [handler for logger in (logging.root, *loggers) for handler in logger.handlers]
        on_terminal = [handler for handler in handlers if getattr(handler, "stream", None) in (sys.stdout, sys.stderr)]
        for source in (*map(logging.getLogger, ("DeepSpeed", "py.warnings")), *on_terminal, logging.lastResort):
            if source is not None and self not in source.filters:
                source.addFilter(self)
                self._filtered.append(source)


CHATTER = Chatter()
