"""One file, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

#: What a case must come to. ``EITHER``: damage that may hit values alone.
REFUSED, KEPT, EITHER = "refused", "kept", "either"


class Case(NamedTuple):
    """One file.

    Attributes:
        what: words for whoever has to find the case again.
        data: the bytes of the file.
        expected: one of the three above.
    """

    what: str
    data: bytes
    expected: str = EITHER


Family = Callable[[], Iterator[Case]]
