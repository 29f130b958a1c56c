"""4-bit embeddings compiled and exported."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.embedding_models import embedding, expected, indices, tied
from tests.test_isa import CAPABILITIES, SUPPORTED, _param, run

# --- compiled, exported -------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    torch.compiler.reset()  # or the limit of recompilations counts other tests' tables, too
    table = embedding(padding_idx=0)
    compiled = torch.compile(table, fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3), (0, 3), (1, 1)):
        idx = indices(*shape)
        assert torch.equal(compiled(idx), expected(table, idx))
        with torch.inference_mode():
            assert torch.equal(compiled(idx), expected(table, idx))


def test_inference_mode_and_vmap() -> None:
    table, idx = embedding(), indices(4, 3)
    with torch.inference_mode():
        assert table(idx).is_inference()
        assert torch.equal(table(idx), expected(table, idx))
    assert torch.equal(torch.func.vmap(table)(idx), expected(table, idx))


def test_compiled_with_a_tied_head() -> None:
    model = tied()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 3), (5, 1)):
            idx = indices(*shape)
            assert torch.equal(compiled(idx), model(idx))


WRITERS = [name for name in CAPABILITIES if SUPPORTED[name]]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    with ThreadPoolExecutor() as pool:
        list(
            pool.map(
                lambda writer: run(
                    writer, "-m", "tests.children.export_embedding", str(folder), writer
                ),
                WRITERS,
            )
        )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("reader", [_param(name) for name in CAPABILITIES])
def test_a_program_from_any_instruction_set(reader: str, programs: Path) -> None:
    """The rows are equal bit for bit, whoever exported and whoever runs."""
    run(reader, "-m", "tests.children.load_embedding", str(programs), *WRITERS)
