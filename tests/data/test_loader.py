"""Reading ahead."""

import threading

import pytest

from vdit.data.loader import ahead


def test_reading_ahead_keeps_the_order_and_is_one_item_in_front() -> None:
    """Item 1 is read while item 0 is used, and item 2 is not asked for before item 0 is done."""
    begun = [threading.Event() for _ in range(4)]

    def read(item: int) -> int:
        begun[item].set()
        return item**2

    got = []
    for made in ahead(read, range(4)):
        got.append(made)
        if len(got) < 4:
            assert begun[len(got)].wait(60)
        if len(got) < 3:
            assert not begun[len(got) + 1].is_set()
    assert got == [0, 1, 4, 9]
    assert list(ahead(read, [])) == []


def test_what_cannot_be_read_is_raised_in_its_turn() -> None:
    def read(item: int) -> int:
        if item == 1:
            raise ValueError("item 1")
        return item

    made = ahead(read, range(3))
    assert next(made) == 0
    with pytest.raises(ValueError, match="item 1"):
        next(made)
