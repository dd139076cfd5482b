"""The house rules that a machine can check: layers, sizes, what may import what."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "loraswarm"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = {
    "errors": 0,
    "config": 1,
    "core": 1,
    "kernels": 2,
    "adapters": 2,
    "text": 2,
    "memory": 3,
    "models": 3,
    "engine": 4,
    "cluster": 5,
    "server": 6,
    "llm": 6,
    "demo": 6,
    "bench": 6,
    "simulate": 6,
    "commands": 7,
    "__main__": 8,
}
TORCH_FREE = [
    "loraswarm",
    "loraswarm.__main__",
    "loraswarm.config",
    "loraswarm.errors",
    "loraswarm.core.client",
    "loraswarm.core.sequence",
    "loraswarm.adapters.catalog",
    "loraswarm.adapters.describing",
    "loraswarm.adapters.remote_store",
    "loraswarm.adapters.convert",
    "loraswarm.adapters.inferred_shape",
    "loraswarm.adapters.methods",
    "loraswarm.commands.adapters",
    "loraswarm.memory.memory",
    "loraswarm.engine.scheduler",
    "loraswarm.engine.policies",
    "loraswarm.engine.policies.merging",
    "loraswarm.engine.child_client",
    "loraswarm.cluster.migration.from_view",
    "loraswarm.cluster.migration.greedy",
    "loraswarm.cluster.migration.ilp",
    "loraswarm.cluster.migration.pairs",
    "loraswarm.cluster.placement",
    "loraswarm.cluster.prefixes",
    "loraswarm.cluster.residency",
    "loraswarm.cluster.routing",
    "loraswarm.cluster.scaling",
    "loraswarm.cluster.view",
    "loraswarm.engine.reports",
    "loraswarm.demo",
    "loraswarm.core.cost_model",
    "loraswarm.bench.calibrate",
    "loraswarm.bench.compare",
    "loraswarm.bench.http_target",
    "loraswarm.bench.metrics",
    "loraswarm.bench.offline",
    "loraswarm.bench.plot",
    "loraswarm.bench.report",
    "loraswarm.bench.runner",
    "loraswarm.bench.workload",
    "loraswarm.commands.bench",
    "loraswarm.commands.bench_app",
    "loraswarm.commands.simulate",
    "loraswarm.commands.simulate_cluster",
    "loraswarm.simulate.oracle",
    "loraswarm.simulate.plot",
]
ONLY_IN = {
    "numba": "kernels/cpu",
    "llvmlite": "kernels/cpu",
    "triton": "kernels/triton",
    "highspy": "cluster",
    "ray": "cluster",
    "fastapi": "server",
    "matplotlib": ("bench", "simulate"),
    "prometheus_client": "server",
    "uvicorn": "server",
    "zmq": "engine",
    "openai": "demo",
    "peft": "demo",
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_TRITON_LINES = 120
MAX_PARAMETERS = 6
COMMAND_LINES = {"__main__.py", "bench_app.py", "simulate_app.py"}
BANNED_NAMES = {"utils", "common", "helpers", "misc"}


def imports_of(path: Path) -> set[str]:
    """Every module a file imports, also inside functions."""
    found = set()
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""}
    return found


def part_of(module: str) -> str:
    """`loraswarm.engine.step` -> `engine`."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else ""


def functions_of(path: Path):
    for node in _nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_imports_point_down_and_peers_do_not_meet():
    wrong = []
    for path in FILES:
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for module in imports_of(path):
            if not module.startswith("loraswarm."):
                continue
            other = part_of(module)
            if other != part and LAYERS[other] >= LAYERS[part]:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_heavy_packages_stay_in_their_folder():
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in FILES
        for module in imports_of(path)
        if (home := ONLY_IN.get(module.split(".")[0]))
        and not path.relative_to(PACKAGE).as_posix().startswith(home)
    ]
    assert not wrong


def test_modules_that_need_no_torch_import_none():
    """One after the other in one process: the first that brings it is named."""
    code = (
        "import importlib, sys\n"
        f"for name in {TORCH_FREE}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'numba', 'transformers'} & sys.modules.keys()\n"
        "    assert not heavy, f'{name} brings {heavy}'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_an_engine_imports_where_only_its_own_packages_are():
    """On a machine for computing there is often no web framework and no message queue."""
    code = (
        "import sys\n"
        "for name in ('fastapi', 'uvicorn', 'zmq', 'msgspec', 'prometheus_client', 'openai'):\n"
        "    sys.modules[name] = None\n"
        "import loraswarm.llm, loraswarm.engine.setup"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_files_and_functions_are_small():
    wrong = []
    for path in FILES:
        lines = path.read_text().count("\n")
        if lines > MAX_FILE_LINES:
            wrong.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for function in functions_of(path):
            size = (function.end_lineno or 0) - function.lineno + 1
            is_kernel = any("triton.jit" in ast.unparse(one) for one in function.decorator_list)
            if size > (MAX_TRITON_LINES if is_kernel else MAX_FUNCTION_LINES):
                wrong.append(f"{path.relative_to(ROOT)}: {function.name} has {size} lines")
    assert not wrong


def test_functions_take_few_parameters():
    """Kernels and what the command line and HTTP turn into options are exempt."""
    wrong = []
    for path in FILES:
        if "kernels" in path.parts or path.name in COMMAND_LINES:
            continue
        for function in functions_of(path):
            names = [a.arg for a in [*function.args.args, *function.args.kwonlyargs]]
            count = len([name for name in names if name not in ("self", "cls")])
            if count > MAX_PARAMETERS:
                wrong.append(f"{path.relative_to(ROOT)}: {function.name} takes {count}")
    assert not wrong


def test_every_module_says_what_it_is():
    wrong = [str(path.relative_to(ROOT)) for path in FILES if not ast.get_docstring(_tree(path))]
    assert not wrong


def test_no_module_is_a_drawer():
    assert not [path for path in FILES if BANNED_NAMES & set(path.with_suffix("").parts)]


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def _nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(_tree(path)))
