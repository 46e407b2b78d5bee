"""The examples of CONTRIBUTING.md."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def examples(title: str) -> list[tuple[str, str]]:
    """The code blocks of a section of CONTRIBUTING: (language, text)."""
    section = re.search(rf"^### {title}\n(.*?)(?=^##)", PAGE.read_text("utf-8"), re.M | re.S)
    assert section is not None
    return re.findall(r"^```(\w+)\n(.*?)^```$", section[1], re.M | re.S)


def run(title: str, **names: Any) -> dict[str, Any]:
    """Runs a section's Python, given these names; returns all names that it knows afterwards."""
    space = {"jax": jax, "jnp": jnp, "Any": Any, **names}
    for language, text in examples(title):
        assert language == "python"
        exec(text, space)
    return space
