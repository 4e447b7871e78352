"""Fills a template of this folder in: one self-contained file, style and script inside."""

import base64
import hashlib
import time
from pathlib import Path
from typing import Any

from blipds.report.charts import HEIGHT, WIDTH

FOLDER = Path(__file__).parent


def render(template: str, script: str = "", **values: Any) -> str:
    """The HTML of a template. All that comes from files is escaped by it; script and style are known by their hash."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, code = ((FOLDER / name).read_text("utf-8") if name else "" for name in ("page.css", script))
    return environment.get_template(template).render(
        style=style,
        script=code,
        style_hash=csp(style),
        script_hash=csp(code),
        written=time.strftime("%Y-%m-%d %H:%M"),
        width=WIDTH,
        height=HEIGHT,
        **values,
    )


def csp(text: str) -> str:
    """How a content security policy names the one script, or style, that a browser may take."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
