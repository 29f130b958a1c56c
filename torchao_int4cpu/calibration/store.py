"""What a calibration has done with weights, in files, so that an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


class Store:
    """What was done with weights, by their names, in files of a directory.

    Args:
        folder: of the run.
        settings: of the run; those of the directory must be the same.

    Raises:
        ValueError: the directory is of another run.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "settings.json"
        if not file.exists():
            if any(folder.iterdir()):
                raise ValueError(
                    f"{str(folder)!r} holds other files; give a directory for this run alone"
                )
            file.write_text(json.dumps(settings))
        elif json.loads(file.read_text()) != settings:
            raise ValueError(
                f"{str(folder)!r} is from a run with other settings, batches or weights; repeat that "
                "run to go on with it, or remove the directory"
            )

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.pt"

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Note what was done with a weight: tensors, and plain values."""
        part = self._folder / f"{name}.part"
        torch.save(state, part)
        part.rename(self._path(name))

    def find(self, name: str) -> dict[str, Any] | None:
        """What was done with a weight, or None."""
        if not self._path(name).exists():
            return None
        state: dict[str, Any] = torch.load(self._path(name), weights_only=True)
        return state

    def all(self, names: Iterable[str]) -> list[dict[str, Any]] | None:
        """What was done with each of these; None if there are none, or one is missing."""
        found = [self.find(name) for name in names]
        done = [state for state in found if state is not None]
        return done if done and len(done) == len(found) else None
