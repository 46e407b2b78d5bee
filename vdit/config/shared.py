"""What sections share: their type, the fields of a training, and simple checks."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vdit.config import default
from vdit.config.identity import flat, value_of
from vdit.errors import UserError
from vdit.runtime.optimizer import OPTIMIZERS, SCHEDULES


class Section(NamedTuple):
    """A section of the configuration."""

    fields: Callable[[], ConfigDict]  # with their defaults
    check: Callable[[ConfigDict], None]  # takes the full configuration; raises `UserError`
    free: tuple[str, ...] = ()  # fields that change no result: a run may continue with other values


def choose(table: Mapping[str, Any], what: str, name: str) -> Any:
    """table[name]; the refusal of an unknown name lists the known ones."""
    if name not in table:
        raise UserError(f"{what}={name!r}: known are {', '.join(sorted(table))}")
    return table[name]


def refusal(config: ConfigDict, names: str, allowed: str) -> UserError:
    """The error for a field, or for several that do not fit together: "A is 1 with B=2: ..."."""
    first, *others = ((name, value_of(config, name)) for name in names.split())
    said = f"{first[0]} is {first[1]!r}"
    if others:
        said += " with " + " and ".join(f"{name}={value!r}" for name, value in others)
    return UserError(f"{said}: {allowed}")


def check_names(config: ConfigDict, tables: Mapping[str, Iterable[str]]) -> None:
    """Each field must name a row of its table."""
    for name, table in tables.items():
        choose(dict.fromkeys(table), name, value_of(config, name))


def check_positive(config: ConfigDict, *names: str) -> None:
    """Each number must be above 0."""
    for name in names:
        if value_of(config, name) <= 0:
            raise refusal(config, name, "a number above 0 is allowed")


def check_sizes(config: ConfigDict, counts: Mapping[str, int]) -> None:
    """Each field must hold that many numbers, all at least 1."""
    for name, count in counts.items():
        value = value_of(config, name)
        if len(value) != count or min(value) < 1:
            raise refusal(config, name, f"{count} numbers of at least 1 are allowed")


def check_only(
    config: ConfigDict, names: Iterable[str], chosen: str, takers: Iterable[str]
) -> None:
    """Fields must be at their defaults unless `chosen` names one of the rows that read them."""
    if value_of(config, chosen) in (takers := tuple(takers)):
        return
    for name in names:
        if value_of(config, name) != value_of(default(), name):
            known = f"{' and '.join(takers)} take" + ("s" if len(takers) == 1 else "")
            raise refusal(config, f"{name} {chosen}", f"only {known} it")


def training(steps: int, batch: int, learning_rate: float) -> ConfigDict:
    """The fields of a training."""
    train = ConfigDict()
    train.steps = steps
    train.batch = batch  # samples per step, over all devices
    train.accumulate = 1  # micro-batches per step
    train.optimizer = "muon"  # adamw, or muon for weight matrices and adamw for the rest
    train.learning_rate = learning_rate  # of weight matrices in attention and MLPs
    train.adam_learning_rate = 2e-3  # of all other parameters; 0: with muon a tenth, else the same
    train.weight_decay = 0.0
    train.warmup = 20  # steps
    train.schedule = "cosine"  # after the warmup: cosine, linear or constant
    train.clip = 1.0  # global norm of the gradients
    train.ema = 0.995  # decay of the exponential moving average of the parameters
    train.averages = False  # keep two more averages at each checkpoint, for any sample.ema later
    return train


RANGES = {
    "learning_rate": (0, 10), "adam_learning_rate": (0, 10), "weight_decay": (0, 10),
    "warmup": (0, 1e9), "ema": (0, 1), "clip": (0, 1e9),
}  # fmt: skip
FREE_OF_TRAINING = ("train.steps", "train.warmup", "train.schedule")


def check_training(config: ConfigDict, section: str) -> None:
    """Checks the names and numbers of a training."""
    optimizer, schedule = f"{section}.train.optimizer", f"{section}.train.schedule"
    tables: dict[str, Iterable[str]] = {optimizer: OPTIMIZERS, schedule: SCHEDULES}
    check_names(config, tables)
    check_positive(config, *(f"{section}.train.{n}" for n in ("batch", "steps", "accumulate")))
    for name, value in flat(config[section].train, f"{section}.train").items():
        low, high = RANGES.get(name.rsplit(".")[-1], (-math.inf, math.inf))
        if isinstance(value, int | float) and not low <= value <= high:
            raise refusal(config, name, f"{low:g} to {high:g} is allowed")
