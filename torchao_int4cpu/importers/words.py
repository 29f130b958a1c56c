"""Eight codes in an int32, as GPTQ, AWQ and compressed-tensors hold them.

Nibble 0 is the lowest::

    bits of a word  31..28  27..24  23..20  19..16  15..12  11..8   7..4    3..0
    nibble             7       6       5       4       3      2      1       0

Which code a nibble holds is each format's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Codes in a word.
CODES = 8
IN_ORDER = tuple(range(CODES))


def unpack_words(words: Tensor, dim: int, order: Sequence[int] = IN_ORDER) -> Tensor:
    """The codes of words, as uint8.

    Args:
        words: int32, any shape.
        dim: along which eight codes follow each other, from the first.
        order: ``order[i]`` is the nibble that holds code i of a word; nibble 0 is the lowest.

    Returns:
        uint8 of the same shape, but 8 times as long along ``dim``.
    """
    shifts = torch.tensor([4 * nibble for nibble in order], dtype=torch.int32)
    shifts = shifts.view([CODES if i == dim + 1 else 1 for i in range(words.ndim + 1)])
    codes: Tensor = (words.unsqueeze(dim + 1) >> shifts).bitwise_and_(15)
    return codes.to(torch.uint8).flatten(dim, dim + 1)


def pack_words(codes: Tensor, dim: int) -> Tensor:
    """The inverse of `unpack_words`, in order; the last word is filled up with zeros.

    Args:
        codes: uint8 of 0 to 15, any shape.
        dim: along which eight codes become a word.

    Returns:
        int32, an eighth as long along ``dim``.
    """
    length = codes.shape[dim]
    words = codes.new_zeros(
        [-(-length // CODES) if i == dim else size for i, size in enumerate(codes.shape)],
        dtype=torch.int32,
    )
    for nibble in range(CODES):
        some = codes.to(torch.int32)[(slice(None),) * dim + (slice(nibble, None, CODES),)]
        words.narrow(dim, 0, some.shape[dim]).bitwise_or_(some << 4 * nibble)
    return words


def check_words(**parts: tuple[object, Sequence[int]]) -> None:
    """Check the parts of a weight that hold words.

    Args:
        parts: by name: a part, and the shape it must have.

    Raises:
        TypeError: one is no int32 tensor.
        ValueError: one has another shape.
    """
    for name, (part, shape) in parts.items():
        check_part(name, part, (torch.int32,), shape)


def check_part(name: str, part: object, dtypes: Sequence[torch.dtype], shape: Sequence[int]) -> None:
    """Check the dtype and the shape of a part.

    Raises:
        TypeError: it is no tensor, or of another dtype.
        ValueError: it has another shape.
    """
    if not isinstance(part, Tensor) or part.dtype not in dtypes:
        got = getattr(part, "dtype", type(part).__name__)
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} is {got}; it must be a tensor of {wanted}, so the file is damaged")
    if list(part.shape) != list(shape):
        raise ValueError(
            f"{name} has shape {list(part.shape)}; beside the other parts of this weight it must be "
            f"{list(shape)}, so the file is damaged, or of another format than its config says"
        )
