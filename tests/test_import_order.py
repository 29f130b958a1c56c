"""A folder imports only folders above it in the list of floors, so that each can be read alone."""

from __future__ import annotations

import ast
from pathlib import Path

import torchao_int4cpu

PACKAGE = Path(torchao_int4cpu.__file__).parent

#: From the top: a floor knows those above it, and of its own modules those above in `MODULES`.
FLOORS = [
    "version",
    "extras",
    "format",
    "algorithms",
    "kernels.portable",
    "kernels.native",
    "kernels",
    "kernels.ops",
    "tensor",
    "dispatch",
    "distributed",
    "checkpoint",
    "importers",
    "quantize",
    "calibration",
    "integrations",
    "convert",
    "bench",
    "commands",
]

#: The modules of each floor, from the top.
MODULES = {
    "format": [
        "act_order",
        "groupwise",
        "layout",
        "huge_pages",
        "packed",
        "packing",
        "slicing",
        "checks",
    ],
    "algorithms": ["choose_qparams", "hessian", "gptq"],
    "kernels.portable": ["prefill", "decode", "dequantize"],
    "kernels.native": ["build", "setup_commands", "library"],
    "kernels": ["selection", "experts"],
    "kernels.ops": ["register", "products", "experts", "dequantize", "slicing"],
    "tensor": ["provenance", "int4", "transposed", "module_repr"],
    "dispatch": [
        "table",
        "transposition",
        "linear",
        "products",
        "embedding",
        "conversions",
        "cuts",
        "indexing",
        "views",
        "concatenation",
        "pieces",
        "copies",
        "reads",
        "scaling",
        "memory",
        "entry",
    ],
    "distributed": ["collectives", "fsdp", "ddp", "quantize_shards", "shared_memory"],
    "checkpoint": ["pickles", "safetensors", "inspect"],
    "importers": [
        "words",
        "groups",
        "weight",
        "torchao_formats",
        "torchao",
        "points",
        "gptq",
        "awq",
        "compressed_tensors",
        "gguf",
        "mlx",
        "onnx",
        "survey",
    ],
    "quantize": ["filters", "report", "run", "obstacles", "parameter", "config"],
    "calibration": [
        "observer",
        "blocks",
        "states",
        "targets",
        "store",
        "work",
        "bits",
        "run",
        "calibrate",
        "config",
    ],
    "convert": [
        "names",
        "plan",
        "shards",
        "directory",
        "native",
        "text",
        "calibrated",
        "foreign",
        "gguf",
        "onnx_weights",
        "export",
        "gguf_export",
    ],
    "integrations": [
        "torchao_int4cpu_on_import",
        "dlpack",
        "onnx_nodes",
        "onnx_program",
        "onnx",
        "safetensors",
        "sizes",
        "torchscript",
        "transformers",
        "transformers_conv1d",
        "transformers_report",
        "transformers_saving",
        "transformers_quantizers",
        "transformers_gguf",
        "transformers_imports",
        "vllm_configs",
        "vllm_layers",
        "vllm",
    ],
    "bench": [
        "timing",
        "layers",
        "experts",
        "views",
        "plot",
        "demo",
        "demo_gguf",
        "model_variants",
        "model",
        "compare",
        "vllm_worker",
        "vllm",
    ],
    "commands": [
        "options",
        "environment",
        "progress",
        "written",
        "info",
        "demo",
        "bench_model",
        "bench_moe",
        "bench_views",
        "bench_vllm",
        "bench",
        "compare",
        "quantize",
        "convert",
        "export",
        "inspect",
    ],
}

#: Folders, and libraries that they must not know.
STRANGERS = {
    "format": ["torchao", "transformers", "vllm"],
    "kernels": ["torchao", "transformers", "vllm"],
    "tensor": ["transformers", "vllm"],
    "dispatch": ["transformers", "vllm"],
    "checkpoint": ["transformers", "vllm"],
    "importers": ["transformers", "vllm"],
    "quantize": ["transformers", "vllm"],
    "calibration": ["transformers", "vllm"],
}

#: Every module, from the top; a folder that comes below its modules is their package.
ROOMS = [
    room
    for floor in FLOORS
    for room in (*(f"{floor}.{module}" for module in MODULES.get(floor, ())), floor)
]
#: What stands above all floors: the package itself, and the command line's entry.
ENTRANCES = ["", "__main__"]


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
    below = [other for other in ROOMS[ROOMS.index(room) + 1 :] if other in names]
    # The package of a module is imported before it, and has a line of documentation only.
    below = [other for other in below if not room.startswith(f"{other}.")]
    strangers = STRANGERS.get(room.split(".")[0], [])
    ours = {name for name in names if path_of(name).exists()}
    return below + [s for s in strangers if s in {name.split(".")[0] for name in names - ours}]


def test_the_list_is_complete() -> None:
    files = set(PACKAGE.rglob("*.py"))
    assert files == {path_of(room) for room in (*ROOMS, *ENTRANCES)}


def test_the_top_of_the_package_has_nothing_else() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "extras.py",
        "version.py",
    }


def test_imports_go_one_way() -> None:
    for room in ROOMS:
        assert broken_rules(room, imported(path_of(room))) == [], room


def test_every_folder_says_what_it_owns() -> None:
    for folder in (PACKAGE, *{path.parent for path in PACKAGE.rglob("*.py")}):
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert text, folder
        assert text.splitlines()[0].endswith("."), folder


def test_no_test_file_is_longer_than_500_lines() -> None:
    paths = Path(__file__).parent.rglob("*.py")
    lengths = {path.name: len(path.read_text().splitlines()) for path in paths}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_the_rule_would_catch_a_wrong_import() -> None:
    assert broken_rules("format.layout", {"format.checks"}) == ["format.checks"]
    assert broken_rules("format.layout", {"tensor.int4"}) == ["tensor.int4"]
    assert broken_rules("kernels.portable.decode", {"kernels.native.library"}) == [
        "kernels.native.library"
    ]
    assert broken_rules("kernels.portable.decode", {"torchao.utils"}) == ["torchao"]
    assert broken_rules("dispatch.entry", {"tensor.int4", "torch"}) == []
