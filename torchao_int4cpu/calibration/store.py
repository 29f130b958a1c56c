"""The weights that a calibration has done, in files, so that an interrupted one goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from torchao_int4cpu.calibration.targets import CalibratedWeight
from torchao_int4cpu.tensor.transposed import Int4Weight


class Store:
    """The weights that are done, in files of a directory.

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

    def save(self, name: str, weight: Int4Weight, told: list[CalibratedWeight]) -> None:
        """Note what has become of a weight."""
        state = {"weight": weight, "told": [list(vars(each).values()) for each in told]}
        part = self._folder / f"{name}.part"
        torch.save(state, part)
        part.rename(self._path(name))

    def find(self, name: str) -> tuple[Any, list[CalibratedWeight]] | None:
        """A weight that is done, and what was said of it; or None."""
        if not self._path(name).exists():
            return None
        state = torch.load(self._path(name), weights_only=True)
        return state["weight"], [CalibratedWeight(*each) for each in state["told"]]
