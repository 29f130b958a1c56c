"""Read the rows of a printed table, whatever the width of its numbers."""

from __future__ import annotations


def split_row(line: str, numbers: int) -> tuple[list[str], list[str]]:
    """The words that a row begins with, and that many columns after them, which must be numbers."""
    words = line.split()
    found = words[-numbers:]
    for number in found:
        float(number.removesuffix("%"))
    return words[:-numbers], found
