"""Stands for `bench.vllm_worker`: 1 ms a token of a prompt, 4 ms a new one; half in 4 bits.

A directory of compressed-tensors is refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ANSWER = "vllm_worker: "


def main() -> None:
    config = json.loads((Path(sys.argv[1]) / "config.json").read_text())
    method = config.get("quantization_config", {}).get("quant_method", "")
    print("vLLM prints, too")
    if method == "compressed-tensors":
        print("Traceback\nAttributeError: there is no op\n  for it\n  bye", file=sys.stderr)
        sys.exit(1)
    share = 0.5 if method == "torchao" else 1.0
    loaded = {"vllm": "1.2", "weight_bytes": 1000 * share, "int4_weights": 0 if share == 1 else 7}
    print(ANSWER + json.dumps(loaded), flush=True)
    for line in sys.stdin:
        prompt_tokens, sequences, new_tokens = json.loads(line)
        if sequences == 99:
            sys.exit("RuntimeError: no more memory")
        seconds = share * sequences * (prompt_tokens * 1e-3 + new_tokens * 4e-3)
        print(ANSWER + json.dumps({"seconds": seconds, "resident_bytes": 5000}), flush=True)


if __name__ == "__main__":
    main()
