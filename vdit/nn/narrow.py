"""The dtype that each kernel is cast to before it is multiplied, so that it can be stored in it."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from vdit.nn.conv import Conv
from vdit.nn.linear import Linear


def operand_dtypes(run: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
    """The dtype to which products cast each kernel of the module that `run` applies, by its path
    ("blocks/joint/mlp/up/kernel").

    Stored in that dtype, a kernel gives the same result to the bit. `run` is traced with
    `arguments` (arrays or their shapes) and static `options`.
    """
    found: dict[str, Any] = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, Linear | Conv):
            found["/".join((*module.path, "kernel"))] = module.matmul.dtype
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(functools.partial(run, **options), *arguments)
    return found
