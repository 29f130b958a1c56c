"""Compare torch's settings before and after the import of this package."""

from __future__ import annotations

import torch


def settings() -> tuple[object, ...]:
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.initial_seed(),
        torch.get_rng_state().sum().item(),
    )


def main() -> None:
    import torchao.quantization  # noqa: F401  # not ours to answer for

    before = settings()
    import torchao_int4cpu  # noqa: F401

    assert settings() == before


if __name__ == "__main__":
    main()
