"""Counts the matrix products of a computation in its jaxpr."""

import math
from collections import Counter
from collections.abc import Iterator
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


def products(jaxpr: Any, times: int = 1) -> Counter[Product]:
    """Every matrix product of a computation and its count, with scans unrolled."""
    found: Counter[Product] = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left, right = (v.aval for v in equation.invars)
            (result,) = (v.aval for v in equation.outvars)
            dtypes = (str(left.dtype), str(right.dtype), str(result.dtype))
            numbers = equation.params["dimension_numbers"]
            found[Product(left.shape, right.shape, numbers, dtypes)] += times
        length = equation.params["length"] if equation.primitive.name == "scan" else 1
        for part in parts(equation):
            found += products(part, times * length)
    return found


def widest(jaxpr: Any) -> int:
    """Elements of the largest result of one matrix product (attention's are batches of them)."""
    sizes = (product.sizes() for product in products(jaxpr))
    return max((rows * columns for batch, rows, _, columns in sizes if batch == 1), default=0)


def parts(equation: Any) -> list[Any]:
    """The jaxprs that an equation runs; of branches (such as those by platform) only one runs,
    assumed to be the one of most FLOPs."""
    inner = list(inner_jaxprs(equation.params.values()))
    return [max(inner, key=flops)] if equation.primitive.name == "cond" else inner


def inner_jaxprs(values: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from inner_jaxprs(value)
        elif hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr


def convolutions(jaxpr: Any, times: int = 1) -> int:
    """FLOPs of all convolutions of a computation, with scans unrolled."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            kernel, (result,) = equation.invars[1].aval.shape, equation.outvars
            out_axis = equation.params["dimension_numbers"].rhs_spec[0]
            total += (
                times * 2 * math.prod(result.aval.shape) * (math.prod(kernel) // kernel[out_axis])
            )
        length = equation.params["length"] if equation.primitive.name == "scan" else 1
        for part in parts(equation):
            total += convolutions(part, times * length)
    return total


def flops(jaxpr: Any) -> int:
    """FLOPs of all matrix products and convolutions of a computation."""
    multiplied = sum(count * product.flops() for product, count in products(jaxpr).items())
    return multiplied + convolutions(jaxpr)
