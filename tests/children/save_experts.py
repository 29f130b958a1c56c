"""Quantizes models with experts while they are loaded, and saves them."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.moe_models import from_file


def main() -> None:
    out, *sources = map(Path, sys.argv[1:])
    for source in sources:
        from_file(source).save_pretrained(out / source.name)


if __name__ == "__main__":
    main()
