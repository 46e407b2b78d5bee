"""What sections share: the shape of a section, the fields of a training, and simple checks."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vdit.config import default
from vdit.errors import UserError


class Section(NamedTuple):
    """A section of the configuration."""

    fields: Callable[[], ConfigDict]  # with their defaults
    check: Callable[[ConfigDict], None]  # of the whole configuration, refuses this section's values
    free: tuple[str, ...] = ()  # fields that change no result, so that a run may go on with others


def choose(table: Mapping[str, Any], what: str, name: str) -> Any:
    """table[name]; an unknown name is refused with the list of the known ones."""
    if name not in table:
        raise UserError(f"{what}={name!r}: known are {', '.join(sorted(table))}")
    return table[name]


def value_of(config: ConfigDict, name: str) -> Any:
    """The field of a dotted name."""
    return functools.reduce(lambda part, field: part[field], name.split("."), config)


def check_names(config: ConfigDict, tables: Mapping[str, Iterable[str]]) -> None:
    """Refuses fields that name no row of their table."""
    for name, table in tables.items():
        choose(dict.fromkeys(table), name, value_of(config, name))


def check_positive(config: ConfigDict, *names: str) -> None:
    """Refuses numbers that are not above 0."""
    for name in names:
        if value_of(config, name) <= 0:
            raise UserError(f"{name} is {value_of(config, name)}: a number above 0 is allowed")


def check_sizes(config: ConfigDict, counts: Mapping[str, int]) -> None:
    """Refuses fields that are not so many numbers of at least 1."""
    for name, count in counts.items():
        value = value_of(config, name)
        if len(value) != count or min(value) < 1:
            raise UserError(f"{name} is {value}: {count} numbers of at least 1 are allowed")


def check_only(
    config: ConfigDict, names: Iterable[str], chosen: str, takers: Iterable[str]
) -> None:
    """Refuses fields that are not at their default where `chosen` names a row that ignores them."""
    if value_of(config, chosen) in (takers := tuple(takers)):
        return
    for name in names:
        if value_of(config, name) != value_of(default(), name):
            known = f"{' and '.join(takers)} take" + ("s" if len(takers) == 1 else "")
            raise UserError(
                f"{name} is given with {chosen}={value_of(config, chosen)}: only {known} it"
            )


def training(steps: int, batch: int, learning_rate: float) -> ConfigDict:
    """The fields of a stage that trains a network."""
    train = ConfigDict()
    train.steps = steps
    train.batch = batch  # samples of one step, over all devices
    train.accumulate = 1  # parts that a step's batch is computed in
    train.optimizer = "muon"  # muon (matrices; the rest by adamw) or adamw
    train.learning_rate = learning_rate  # of the matrices in attention and MLP
    train.adam_learning_rate = 2e-3  # of all other parameters; 0: muon a tenth, adamw the same
    train.weight_decay = 0.0
    train.warmup = 20  # steps
    train.schedule = "cosine"  # cosine, linear or constant after the warm-up
    train.clip = 1.0  # global norm of gradients
    train.ema = 0.995  # decay of the averaged parameters
    return train


FREE_OF_TRAINING = ("train.steps", "train.warmup", "train.schedule")


def check_training(config: ConfigDict, section: str) -> None:
    """Refuses a training's numbers that are not above 0."""
    check_positive(config, *(f"{section}.train.{n}" for n in ("batch", "steps", "accumulate")))
