"""Noise in files that were written well: cut, flipped, overwritten, swapped, spliced."""

from __future__ import annotations

import io
import random
import struct
import zipfile
from collections.abc import Iterator, Mapping

from tests.corruptions.case import REFUSED, Case, Family
from tests.test_old_files import FILES, SETS

#: Files that were written well, by the names that cases have.
Files = Mapping[str, bytes]


def _pt() -> Files:
    names = [f"{name}/{file}" for name in SETS for file in ("state.pt", "parameter.pt")]
    return {name: (FILES / name).read_bytes() for name in names}


def _safetensors() -> Files:
    names = [f"{name}/model.safetensors" for name in SETS]
    return {name: (FILES / name).read_bytes() for name in names}


def truncations(files: Files, places: int) -> Iterator[Case]:
    """Cut where a record of a zip file or an object of JSON begins, and at ``places`` others."""
    rng = random.Random(f"truncations {list(files)}")
    for file, data in files.items():
        borders = [i for i in range(len(data)) if data[i : i + 2] == b"PK" or data[i : i + 1] == b"{"]
        stops = {border + step for border in [*borders, 0, len(data)] for step in (-1, 0, 1, 4)}
        stops |= set(rng.sample(range(len(data)), places))
        for stop in sorted(stop for stop in stops if 0 <= stop < len(data)):
            yield Case(f"{file} cut at {stop}", data[:stop], REFUSED)


def flips(files: Files, count: int) -> Iterator[Case]:
    """One bit; four of five in what says what the values are, where it can be noticed."""
    rng = random.Random(f"flips {list(files)}")
    for file, data in files.items():
        telling = _telling(data)
        for number in range(count):
            place = rng.randrange(len(data)) if number % 5 == 0 else rng.choice(telling)
            bit = rng.randrange(8)
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            yield Case(f"{file} bit {bit} of byte {place}", bytes(damaged))


def _telling(data: bytes) -> list[int]:
    """Places of the pickle and the directory of a zip file, or of the header of a safetensors file."""
    if not data.startswith(b"PK"):
        return list(range(8 + struct.unpack("<Q", data[:8])[0]))
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        (pickled,) = (info for info in file.infolist() if info.filename.endswith("/data.pkl"))
        start = data.index(file.read(pickled))
        return [*range(start, start + pickled.file_size), *range(file.start_dir, len(data))]


def overwritten(files: Files, count: int) -> Iterator[Case]:
    """Up to 64 consecutive bytes become 0, 255 or noise, or are cut out."""
    rng = random.Random(f"overwritten {list(files)}")
    for file, data in files.items():
        for number in range(count):
            length = rng.randint(1, 64)
            start = rng.randrange(len(data) - length)
            new = [b"\0" * length, b"\xff" * length, rng.randbytes(length), b""][number % 4]
            what = f"{file} bytes {start} to {start + length} become {new.hex()}"
            yield Case(what, data[:start] + new + data[start + length :])


def swapped(files: Files, count: int) -> Iterator[Case]:
    """Two regions of one length change places."""
    rng = random.Random(f"swapped {list(files)}")
    for file, data in files.items():
        for _ in range(count):
            length = rng.randint(1, 400)
            a = rng.randrange(len(data) - 2 * length)
            b = rng.randrange(a + length, len(data) - length + 1)
            middle = data[a + length : b]
            new = data[:a] + data[b : b + length] + middle + data[a : a + length] + data[b + length :]
            yield Case(f"{file} {length} bytes at {a} and {b}", new)


def spliced(files: Files, count: int) -> Iterator[Case]:
    """The beginning of one file and the end of another."""
    rng = random.Random(f"spliced {list(files)}")
    for _ in range(count):
        first, second = rng.sample(list(files), 2)
        a, b = files[first], files[second]
        stop = rng.randrange(min(len(a), len(b)))
        start = stop if rng.random() < 0.5 else rng.randrange(len(b))
        yield Case(f"{first} up to {stop}, then {second} from {start}", a[:stop] + b[start:])


RAW_PT: dict[str, Family] = {
    "pt-truncated": lambda: truncations(_pt(), 20),
    "pt-flipped": lambda: flips(_pt(), 120),
    "pt-overwritten": lambda: overwritten(_pt(), 32),
    "pt-swapped": lambda: swapped(_pt(), 12),
    "pt-spliced": lambda: spliced(_pt(), 120),
}

RAW_SAFETENSORS: dict[str, Family] = {
    "safetensors-truncated": lambda: truncations(_safetensors(), 30),
    "safetensors-flipped": lambda: flips(_safetensors(), 160),
    "safetensors-overwritten": lambda: overwritten(_safetensors(), 32),
    "safetensors-swapped": lambda: swapped(_safetensors(), 12),
    "safetensors-spliced": lambda: spliced(_safetensors(), 160),
}
