"""A module imports only modules above it in the list of rooms, so that each can be read alone."""

from __future__ import annotations

import ast
from pathlib import Path

import torchao_int4cpu

PACKAGE = Path(torchao_int4cpu.__file__).parent

ROOMS = [
    "version",
    "groupwise",
    "layout",
    "slicing",
    "choose_qparams",
    "kernels.packed",
    "kernels.checks",
    "kernels.decode",
    "kernels.prefill",
    "kernels.build",
    "kernels.setup_commands",
    "kernels.native",
    "kernels.choice",
    "kernels.experts",
    "kernels.rows",
    "kernels.ops",
    "kernels.expert_ops",
    "kernels.row_ops",
    "kernels",
    "parts",
    "tensor",
    "transposed",
    "dispatch.table",
    "dispatch.linear",
    "dispatch.products",
    "dispatch.embedding",
    "dispatch.conversions",
    "dispatch.cuts",
    "dispatch.dims",
    "dispatch.choices",
    "dispatch.views",
    "dispatch.joins",
    "dispatch.copies",
    "dispatch.collectives",
    "dispatch.sharding",
    "dispatch.hooks",
    "dispatch",
    "checkpoint",
    "transformers_mends",
    "safetensors_format",
    "upstream",
    "call_site",
    "module_repr",
    "shards",
    "quantize_parameter",
    "config",
    "extras",
    "timing",
    "bench",
    "bench_moe",
    "bench_views",
    "plot",
    "demo",
    "bench_model",
    "directory_plan",
    "quantize_directory",
    "inspection",
    "",  # the package itself
    "commands",
    "commands.options",
    "commands.environment",
    "commands.steps",
    "commands.info",
    "commands.demo",
    "commands.bench_model",
    "commands.bench_moe",
    "commands.bench_views",
    "commands.bench",
    "commands.quantize",
    "commands.inspect",
    "__main__",
]

#: Modules and what they must not know.
STRANGERS = {
    "groupwise": ["torchao", "layout"],
    "layout": ["torchao", "groupwise", "choose_qparams"],
    "slicing": ["torchao", "choose_qparams"],
    "choose_qparams": ["layout"],
    "kernels": ["torchao", "choose_qparams"],
}


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports: ours without the package's name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name.removeprefix("torchao_int4cpu").removeprefix(".") for name in names}


def path_of(room: str) -> Path:
    path = PACKAGE / room.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def broken_rules(room: str, names: set[str]) -> list[str]:
    below = [other for other in ROOMS[ROOMS.index(room) :] if other and other in names]
    unknown = [
        s for s in STRANGERS.get(room.split(".")[0], []) if s in {n.split(".")[0] for n in names}
    ]
    return below + unknown


def test_the_list_is_complete() -> None:
    files = set(PACKAGE.rglob("*.py"))
    assert files == {path_of(room) for room in ROOMS}


def test_imports_go_one_way() -> None:
    for room in ROOMS:
        assert broken_rules(room, imported(path_of(room))) == [], room


def test_the_rule_would_catch_a_wrong_import() -> None:
    assert broken_rules("layout", {"tensor"}) == ["tensor"]
    assert broken_rules("kernels.decode", {"torchao.utils"}) == ["torchao"]
    assert broken_rules("dispatch", {"tensor", "torch"}) == []
