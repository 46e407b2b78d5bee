"""What the flags of all tools share: a wrong one is one line."""

import ast
import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from vdit.data.decode import one_line
from vdit.errors import UserError
from vdit.runtime.mesh import AXES, make_mesh

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def read_mesh(text: str) -> dict[str, int]:
    """{"data": 2, "fsdp": 64} of data:2,fsdp:64."""
    made = {}
    for part in text.split(","):
        name, _, size = part.partition(":")
        if name not in AXES or not size.lstrip("-").isdigit():
            raise UserError(f"--mesh={text}: AXIS:SIZE,... is allowed, with {', '.join(AXES)}")
        made[name] = int(size)
    return made


def mesh_of(text: str) -> Mesh | None:
    """The mesh of --mesh=AXIS:SIZE,... over all devices that are here; None without the flag."""
    return make_mesh(read_mesh(text)) if text else None


def read_config(path: str, changes: Sequence[str] = ()) -> "ConfigDict":
    """get_config of experiments/X.py[:ARGUMENT], with changes "--config.field=value"."""
    from ml_collections import ConfigDict

    from vdit.config import command

    config = command.load(command.named(path))
    for change in changes:
        name, equals, text = change.removeprefix("--config.").partition("=")
        if not change.startswith("--config.") or not equals:
            raise UserError(f"{one_line(change)}: flags of --help and --config.field=value")
        *path_to, last = name.split(".")
        node = config
        for part in (*path_to, last):
            if not isinstance(node, ConfigDict) or part not in node:
                near = difflib.get_close_matches(part, list(node) if hasattr(node, "keys") else ())
                hint = f"; is {near[0]} meant?" if near else ""
                raise UserError(f"{one_line(change)}: there is no field {name}{hint}")
            parent, node = node, node[part]
        try:
            value = text if isinstance(node, str) else ast.literal_eval(text)
            if isinstance(node, bool) != isinstance(value, bool):
                raise TypeError
            parent[last] = value
        except (TypeError, ValueError, SyntaxError) as error:
            raise UserError(
                f"{one_line(change)}: {name} is a {type(node).__name__}, as {node!r}"
            ) from error
    return config
