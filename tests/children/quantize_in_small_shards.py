"""The command line with small shards; it waits to be killed after so many of them, or "never"."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

from torchao_int4cpu import __main__
from torchao_int4cpu.convert import shards


def main(wait_after: str, *command: str) -> None:
    write_shard = shards._write_shard
    written = 0

    def write_or_wait(*arguments: Any) -> Any:
        nonlocal written
        while str(written) == wait_after:  # at no moment that depends on how fast this machine is
            time.sleep(1)
        written += 1
        return write_shard(*arguments)

    # A shell's background job ignores SIGINT, and so would this child of a test that runs in one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    shards.SHARD_BYTES = 1
    shards._write_shard = write_or_wait  # type: ignore[assignment]
    sys.exit(__main__.main(list(command)))


if __name__ == "__main__":
    main(*sys.argv[1:])
