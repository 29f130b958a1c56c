"""Every function of torch that takes a tensor, called with a 4-bit weight: right, or refused by name.

The oracle is the dense twin, the weight's `dequantize`. See `tests.children.every_function`.
"""

from __future__ import annotations

import json

import pytest

from tests.processes import run_child

#: More deaths than this are not looked at one by one.
MOST_DEATHS = 20


@pytest.mark.parametrize(
    ("first", "step"), [(0, 20), pytest.param(0, 1, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_every_function_is_right_or_refused(first: int, step: int) -> None:
    wrong, checked = [], 0
    for _ in range(MOST_DEATHS):
        done = run_child("every_function", str(first), str(step))
        lines = done.stdout.splitlines()
        names = [line for line in lines if not line.startswith("[")]
        for name, outcomes in zip(names, (line for line in lines if line.startswith("["))):
            for outcome in json.loads(outcomes):
                checked += outcome in ("same", "refused")
                if outcome not in ("same", "refused"):
                    wrong.append(f"{name}: {outcome}")
        if done.returncode == 0:
            break
        wrong.append(f"{names[-1]}: ended with {done.returncode}: {done.stderr[-300:]}")
        first = int(names[-1].split()[0]) + step
    assert wrong == []
    assert checked > 900 // step
