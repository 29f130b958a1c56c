"""Long steps of a command: a tqdm bar on a terminal, else a line for each."""

from __future__ import annotations

import contextlib
import sys
import warnings
from typing import Any


class Steps:
    """``with Steps() as steps``: ``steps.show`` is a `demo.Progress`."""

    def __enter__(self) -> Steps:
        warnings.filterwarnings("ignore", module="torch|transformers")
        self._last = ""
        self._bar: Any = None
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}")
        return self

    def show(self, step: str, done: int, total: int) -> None:
        """Tell of a step, and how much of it is done out of how much (0 of 0 if that is not known)."""
        if self._bar is not None:
            if step != self._last:
                self._bar.reset(total or 1)
            self._bar.set_description_str(step, refresh=False)
            self._bar.n = done
            self._bar.refresh()
        elif step != self._last:
            print(f"... {step}", file=sys.stderr, flush=True)
        self._last = step

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
