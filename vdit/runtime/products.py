"""Counts the matrix products of a computation in its jaxpr."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Product:
    """One dot_general: shapes, dimension numbers, operand and result dtypes."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    numbers: Any
    dtypes: tuple[str, str, str]

    def plain(self) -> "Product":
        """The same product as (b, M, K) x (b, K, N), or without the b."""
        b, m, k, n = self.sizes()
        if b == 1:
            numbers: Any = (((1,), (0,)), ((), ()))
            return Product((m, k), (k, n), numbers, self.dtypes)
        return Product((b, m, k), (b, k, n), (((2,), (1,)), ((0,), (0,))), self.dtypes)

    def sizes(self) -> tuple[int, int, int, int]:
        """(batch, rows, contracted, columns)."""
        (contract, _), (batch, right_batch) = self.numbers
        b = math.prod(self.left[axis] for axis in batch)
        k = math.prod(self.left[axis] for axis in contract)
        del right_batch
        return b, math.prod(self.left) // (b * k), k, math.prod(self.right) // (b * k)

    def flops(self) -> int:
        return 2 * math.prod(self.sizes())


# Scopes of a train step (`vdit.train.make_step`, and JAX's own of rematerialisation) whose products
# are not the model's.
OTHERS = ("optimizer", "rematted_computation")


def equations(jaxpr: Any, without: Sequence[str] = (), times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every equation that a computation runs and how often, with scans unrolled; of branches (such
    as those by platform) only one runs, assumed to be the one of most FLOPs.

    `without`: scopes (`jax.named_scope`) that are left out.
    """
    for equation in jaxpr.eqns:
        if without and set(without) & set(str(equation.source_info.name_stack).split("/")):
            continue
        yield equation, times
        length = equation.params["length"] if equation.primitive.name == "scan" else 1
        parts = list(inner_jaxprs(equation.params.values()))
        if equation.primitive.name == "cond":
            parts = [max(parts, key=flops)]
        for part in parts:
            yield from equations(part, without, times * length)


def products(jaxpr: Any) -> Counter[Product]:
    """Every matrix product of a computation and its count."""
    found: Counter[Product] = Counter()
    for equation, times in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            found[_product(equation)] += times
    return found


def _product(equation: Any) -> Product:
    left, right = (v.aval for v in equation.invars)
    (result,) = (v.aval for v in equation.outvars)
    dtypes = (str(left.dtype), str(right.dtype), str(result.dtype))
    return Product(left.shape, right.shape, equation.params["dimension_numbers"], dtypes)


def _convolution(equation: Any) -> int:
    """FLOPs of a convolution."""
    kernel, (result,) = equation.invars[1].aval.shape, equation.outvars
    out_axis = equation.params["dimension_numbers"].rhs_spec[0]
    return 2 * math.prod(result.aval.shape) * (math.prod(kernel) // kernel[out_axis])


def flops(jaxpr: Any, without: Sequence[str] = ()) -> int:
    """FLOPs of all matrix products and convolutions of a computation; `without` as in
    `equations`."""
    total = 0
    for equation, times in equations(jaxpr, without):
        if equation.primitive.name == "dot_general":
            total += times * _product(equation).flops()
        elif equation.primitive.name == "conv_general_dilated":
            total += times * _convolution(equation)
    return total


def widest(jaxpr: Any) -> int:
    """Elements of the largest result of one matrix product (attention's are batches of them)."""
    sizes = (product.sizes() for product in products(jaxpr))
    return max((rows * columns for batch, rows, _, columns in sizes if batch == 1), default=0)


def inner_jaxprs(values: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from inner_jaxprs(value)
        elif hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr
