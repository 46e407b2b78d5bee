"""The page: a template, a style and a script, as they lie in vdit/page/serve."""

import functools
from pathlib import Path
from typing import Any

import jinja2

FOLDER = Path(__file__).parents[1] / "page" / "serve"
FILES = {"style.css": "text/css", "page.js": "text/javascript"}


@functools.cache
def file(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def index(model: dict[str, Any]) -> str:
    """The page for a model that takes what `model` says."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(file("page.html.j2")).render(model=model)
