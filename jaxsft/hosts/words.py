"""Processes in words, for sentences about some of many."""

from collections.abc import Collection


def spans(numbers: Collection[int], most: int = 12) -> str:
    """Numbers, rows of them as such and in order: `0, 1 and 3`, `0 to 6 and 8`; after `most` parts, how many more."""
    rows: list[list[int]] = []
    for number in sorted(numbers):
        if rows and number == rows[-1][-1] + 1:
            rows[-1].append(number)
        else:
            rows.append([number])
    parts = []
    for row in rows:
        parts += [f"{row[0]} to {row[-1]}"] if len(row) > 2 else [str(number) for number in row]
    if len(parts) > most:
        parts = [*parts[:most], f"more, {len(numbers)} in all"]
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def processes(numbers: Collection[int]) -> str:
    """`process 2`, or `processes 0, 1 and 3`."""
    return f"process{'es' * (len(numbers) != 1)} {spans(numbers)}"
