"""Shapes of meshes to try."""

from collections.abc import Iterator


def factorisations(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of so many sizes, in order: 4 of 2 is (1, 4), (2, 2), (4, 1)."""
    if count == 1:
        yield (number,)
        return
    for size in (size for size in range(1, number + 1) if number % size == 0):
        for rest in factorisations(number // size, count - 1):
            yield (size, *rest)
