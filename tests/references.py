"""What functions written in C might do wrong that no result shows."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Sequence

from torch import Tensor


def assert_keeps_no_reference(call: Callable[[], object], kept: Sequence[object]) -> None:
    """Call often: neither tensors nor references to what is ``kept`` grow with the calls."""

    def count(times: int) -> list[int]:
        for _ in range(times):
            call()
        gc.collect()
        tensors = sum(type(found) is Tensor for found in gc.get_objects())
        return [tensors, *map(sys.getrefcount, kept)]

    before, after = count(10), count(1000)
    # A reference kept by each call would be a thousand; caches of torch's may keep one.
    assert all(abs(then - now) < 100 for then, now in zip(before, after)), (before, after)


def in_three_threads(work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
