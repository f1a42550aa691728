"""Imports point one way, and importing a module does nothing but define."""

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import tensorrt_llm
import tensorrt_llm.engine

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tensorrt_llm"
MODULES = {
    ".".join(("tensorrt_llm", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}

PORT = ROOT / "examples" / "qwen"
PORT_MODULES = {
    ".".join(file.relative_to(PORT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PORT.rglob("*.py"))
}
FILES = MODULES | PORT_MODULES

# Each part of the package and the parts it may import. A part is a file or a folder right under the package; the files
# of `quantization` are parts of their own: what describes networks must not come with what engines say of themselves.
ALLOWED = {
    "disk": set(),
    "dtype": set(),
    "limits": set(),
    "mapping": set(),
    "tokenizer": set(),
    "plan": {"dtype"},
    "network": {"dtype", "plan"},
    "verdict": {"quantization.mode"},
    "quantization.mode": set(),
    "quantization.quantize": set(),
    "quantization": {"quantization.mode", "quantization.quantize"},
    "quantization.functional": {"dtype", "network"},
    "quantization.layers": {
        "functional",
        "layers",
        "module",
        "network",
        "parameter",
        "quantization.functional",
        "quantization.mode",
        "quantization.quantize",
    },
    "quantization.smooth_quant": set(),
    "quantization.grid": set(),
    "quantization.gptq": {"quantization.grid", "quantization.quantize"},
    "quantization.awq": {"quantization.grid", "quantization.quantize"},
    "quantization.calibrate": {"dtype", "engine", "runtime"},
    "inspect": {"engine", "engine_file", "plan", "quantization.mode", "timings"},
    "timings": set(),
    "tuning": {"dtype", "engine", "kernels", "plan", "runtime", "timings"},
    "weight_digests": set(),
    "engine_file": {"weight_digests"},
    "weight_file": {"dtype", "engine_file", "plan"},
    "functional": {"dtype", "network"},
    "parameter": {"dtype", "network"},
    "module": {"network", "parameter"},
    "layers": {"functional", "module", "network", "parameter"},
    "models": {"functional", "layers", "mapping", "module", "network", "quantization", "quantization.layers"},
    "passes": {"network"},
    "engine": {
        "disk",
        "dtype",
        "engine_file",
        "limits",
        "plan",
        "quantization.mode",
        "verdict",
        "weight_digests",
        "weight_file",
    },
    "builder": {"engine", "limits", "mapping", "network", "parameter", "passes", "quantization.mode"},
    "kernels": {"dtype", "quantization.quantize"},
    "tensorrt_backend": {"dtype", "engine", "engine_file", "kernels", "plan"},
    "runtime": {
        "dtype",
        "engine",
        "engine_file",
        "kernels",
        "limits",
        "plan",
        "tensorrt_backend",
        "timings",
        "tokenizer",
        "verdict",
        "weight_file",
    },
}
# Imports inside a function, made for a reason that the function states.
LATE = {
    ("tensorrt_llm.network", "tensorrt_llm.functional"),  # operators of Tensor
    ("tensorrt_llm.kernels", "tensorrt_llm.kernels.cpu"),
    ("tensorrt_llm.kernels.cpu.native", "tensorrt_llm.kernels.cpu.native.table"),  # imports what may not be built
    ("tensorrt_llm.kernels", "tensorrt_llm.kernels.cuda"),  # imports triton
    ("tensorrt_llm.kernels", "tensorrt_llm.kernels.cuda.compiled"),  # imports triton
    ("tensorrt_llm.kernels", "tensorrt_llm.kernels.cuda.greedy"),  # imports triton
    ("tensorrt_llm.kernels", "tensorrt_llm.kernels.cuda.step_integers"),  # imports triton
}
# Each folder of the port and what else of the port it may import: folders, or modules beside them. Scripts are none.
PORT_ALLOWED = {
    "checkpoint": set(),
    "ft": {"checkpoint"},
    "texts": {"chat_prompt", "token_files"},
    "compiling": {"checkpoint", "command_line", "dummy_weights", "ft", "host_memory", "texts", "weight"},
    "calibration": {"checkpoint", "compiling", "weight"},
    "summary": {"backends", "table", "texts"},
    "benchmarking": {"backends", "chat_prompt", "command_line", "summary", "table"},
}
TORCH_FREE = ("request", "kv_cache", "scheduler", "batch")


def imports_of(name: str, nodes: list[ast.stmt]) -> set[str]:
    """Modules that these statements import, absolute; `from package import module` counts as the module."""
    found: set[str] = set()
    is_package = FILES[name].name == "__init__.py"
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = name.split(".") if is_package else name.split(".")[:-1]
            above = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base)
    return found


def executed_at_import(name: str) -> list[ast.stmt]:
    """Import statements outside of functions and of `if TYPE_CHECKING`."""
    statements: list[ast.stmt] = []
    pending: list[ast.AST] = list(ast.parse(FILES[name].read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            statements.append(node)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return statements


def all_imports(name: str) -> list[ast.stmt]:
    return [node for node in ast.walk(ast.parse(FILES[name].read_text())) if isinstance(node, ast.stmt)]


def part_of(module: str) -> str:
    _, _, path = module.partition(".")
    return path if path.startswith("quantization.") else path.partition(".")[0]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "tensorrt_llm"])
def test_a_module_imports_only_what_its_part_may(name: str) -> None:
    imported = {part_of(module) for module in imports_of(name, executed_at_import(name)) if module in MODULES}
    assert imported - {part_of(name)} <= ALLOWED[part_of(name)]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "tensorrt_llm"])
def test_imports_inside_functions_are_the_known_ones(name: str) -> None:
    in_package = {module for module in imports_of(name, all_imports(name)) if module in MODULES}
    late = in_package - imports_of(name, executed_at_import(name))
    assert {(name, module) for module in late} - LATE <= {("tensorrt_llm.network", "tensorrt_llm.parameter")}


def test_there_are_no_import_cycles() -> None:
    graph = {name: imports_of(name, executed_at_import(name)) & set(MODULES) - {name} for name in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_parts_themselves_form_no_cycle() -> None:
    TopologicalSorter(ALLOWED).prepare()


def port_imports(name: str) -> set[str]:
    """Modules of the port that a module of it imports, inside of functions too."""
    return imports_of(name, all_imports(name)) & set(PORT_MODULES) - {name}


@pytest.mark.parametrize("folder", sorted({file.parent.name for file in PORT_MODULES.values()} - {PORT.name}))
def test_a_folder_of_the_port_imports_only_what_it_may(folder: str) -> None:
    members = [name for name in PORT_MODULES if name.partition(".")[0] == folder]
    imported = {module.partition(".")[0] for name in members for module in port_imports(name)}
    assert imported - {folder} <= PORT_ALLOWED[folder]


def test_the_port_has_no_import_cycle_of_modules_or_folders() -> None:
    modules = {name: port_imports(name) for name in PORT_MODULES}
    TopologicalSorter(modules).prepare()  # raises CycleError
    parts: dict[str, set[str]] = {}
    for name, imported in modules.items():
        part = name.partition(".")[0]
        parts.setdefault(part, set()).update({module.partition(".")[0] for module in imported} - {part})
    TopologicalSorter(parts).prepare()


@pytest.mark.parametrize("name", TORCH_FREE)
def test_scheduling_knows_no_tensors(name: str) -> None:
    """Neither the module nor what it imports inside the package imports torch."""
    pending, seen = [f"tensorrt_llm.runtime.{name}"], set()
    while pending:
        module = pending.pop()
        seen.add(module)
        imported = imports_of(module, all_imports(module))
        assert not any(other.split(".")[0] == "torch" for other in imported), module
        pending += [other for other in imported if other in MODULES and other not in seen]


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    ).stdout


def loaded_by(code: str) -> set[str]:
    """The modules that are there after `code`."""
    return set(json.loads(run_python(f"{code}\nimport json, sys; print(json.dumps(sorted(sys.modules)))")))


def test_importing_the_package_loads_no_optional_or_slow_library() -> None:
    loaded = loaded_by("from tensorrt_llm import *")
    assert not {"transformers", "triton", "tiktoken", "tokenizers", "datasets"} & loaded


def test_what_the_package_offers_comes_when_it_is_asked_for() -> None:
    assert all(getattr(tensorrt_llm, name).__name__ in (name, f"tensorrt_llm.{name}") for name in tensorrt_llm.__all__)
    assert tensorrt_llm.Engine is tensorrt_llm.engine.Engine
    assert not hasattr(tensorrt_llm, "Engin")
    with pytest.raises(ImportError, match="cannot import name 'nonsense' from 'tensorrt_llm'"):
        exec("from tensorrt_llm import nonsense")


def test_an_engine_file_is_opened_and_checked_without_torch() -> None:
    assert not {"torch", "numpy"} & loaded_by("import tensorrt_llm.engine_file")


def test_what_runs_an_engine_loads_nothing_that_describes_models() -> None:
    loaded = {part_of(name) for name in loaded_by("from tensorrt_llm import Engine, runtime") if name in MODULES}
    assert not {"functional", "layers", "models", "module", "network", "parameter", "passes"} & loaded


def test_importing_does_nothing_but_define() -> None:
    """No output, no new thread, no signal handler, no logging set up, no CUDA."""
    modules = [name for name in MODULES if ".cuda" not in name]
    code = f"""
import importlib, json, logging, signal, sys, threading
import torch  # what torch does is not ours
before = threading.active_count(), signal.getsignal(signal.SIGINT), list(logging.root.handlers)
for name in {modules!r}:
    importlib.import_module(name)
after = threading.active_count(), signal.getsignal(signal.SIGINT), list(logging.root.handlers)
assert before == after and not torch.cuda.is_initialized()
"""
    assert run_python(code) == ""
