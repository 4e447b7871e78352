"""Small text files that appear whole or not at all."""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes a hidden file beside `path` and renames it: a reader sees the old text or the new one, never half of it.

    Where processes write at the same time, the last one's text stays. Raises OSError. Not synchronised to the disk:
    after a power cut it may be empty.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="replace")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
