"""The order of the packages, held against the imports in the tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up: a package imports from earlier lines only. `minimind` is what the library exports.
ORDER = """
version errors formatting launch_env
io
config
modeling tokenizer
data optim generation distributed schedule run_folder
tracking
checkpoint
formats
evaluation
training
planning runs
minimind
cli
"""
# What loads no torch, here and in all that it imports: everything on the way to help, errors and reports.
TORCH_FREE = (
    "minimind minimind.version minimind.errors minimind.formatting minimind.launch_env minimind.config.* "
    "minimind.tokenizer minimind.tokenizer.* minimind.run_folder minimind.schedule "
    "minimind.distributed.launch_checks "
    "minimind.checkpoint.files minimind.formats.weight_header minimind.tracking.metrics_file "
    "minimind.modeling.config minimind.modeling.transformers_config minimind.modeling.parameter_count "
    "minimind.planning.memory "
    "minimind.runs.record minimind.runs.info minimind.runs.info_text minimind.runs.compare "
    "minimind.runs.compare_html minimind_cli.*"
)
# The data package prepares text without torch; only what fills batches needs it.
TORCH_IN_DATA = {"minimind.data.loader"}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "manager", "misc", "common"}
MOST_NAMES_AT_THE_TOP = 25


@dataclass(frozen=True)
class Import:
    """One import: the module it names, the line, and whether it runs when the file is loaded."""

    target: str
    line: int
    on_load: bool


def modules() -> dict[str, Path]:
    """Return the files of both packages by module name."""
    found: dict[str, Path] = {}
    for folder, package in (("minimind", "minimind"), ("cli", "minimind_cli")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports_of(source: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """Yield what a file imports: relative imports made absolute, names that are modules as modules."""
    tree = ast.parse(source)
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, node not in late)
        elif isinstance(node, ast.ImportFrom):
            home = module.split(".") if is_package else module.split(".")[:-1]
            base = home[: len(home) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                yield Import(inner if inner in MODULES else origin, node.lineno, node not in late)


def imports(module: str) -> list[Import]:
    """Return the imports of a module in the tree."""
    path = MODULES[module]
    source = path.read_text(encoding="utf-8")
    return list(imports_of(source, module, is_package=path.name == "__init__.py"))


def ours(name: str) -> bool:
    return name.split(".")[0] in ("minimind", "minimind_cli")


def package(module: str) -> str:
    """Return the package, or the top-level module, that a module belongs to."""
    top, *rest = module.split(".")
    return "cli" if top == "minimind_cli" else rest[0] if rest else "minimind"


LEVELS = {name: level for level, line in enumerate(ORDER.split("\n")) for name in line.split()}


def upward(module: str, found: list[Import]) -> list[str]:
    """Return the imports of a module that the order of the packages forbids."""
    own = package(module)
    return [
        f"{module}:{item.line} imports {item.target}"
        for item in found
        if ours(item.target)
        and package(item.target) != own
        and LEVELS.get(package(item.target), sys.maxsize) >= LEVELS[own]
    ]


def test_every_package_stands_in_the_order() -> None:
    assert {package(module) for module in MODULES} == set(LEVELS)


@pytest.mark.parametrize("name", sorted(LEVELS))
def test_a_package_imports_only_from_lower_ones(name: str) -> None:
    found = [
        line for module in MODULES if package(module) == name for line in upward(module, imports(module))
    ]
    assert not found, "move the code, or the package in ORDER: " + "; ".join(found)


def test_nothing_imports_in_a_circle() -> None:
    graph = {
        module: {item.target for item in imports(module) if ours(item.target) and item.target != module}
        for module in MODULES.keys() - {"minimind"}
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def torch_free() -> list[str]:
    """Return the modules that must not load torch."""
    patterns = TORCH_FREE.split()
    return sorted(
        module
        for module in MODULES
        if module in patterns
        or any(pattern.endswith("*") and module.startswith(pattern[:-2]) for pattern in patterns)
        or (module.startswith("minimind.data") and module not in TORCH_IN_DATA)
    )


def test_the_torch_free_modules_load_without_torch() -> None:
    names = [module for module in torch_free() if not module.endswith("__main__")]
    code = (
        f"import sys\nsys.modules['torch'] = sys.modules['accelerate'] = None\nimport importlib\n"
        f"for name in {names}: importlib.import_module(name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_top_of_the_library_is_seen_at_a_glance() -> None:
    names = [path.name for path in (ROOT / "minimind").iterdir() if path.name != "__pycache__"]
    assert len(names) <= MOST_NAMES_AT_THE_TOP, sorted(names)


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert not [path for path in MODULES.values() if VAGUE_NAMES & set(path.stem.split("_"))]


def test_relative_and_late_imports_are_understood() -> None:
    source = "from . import shards\nfrom ..errors import DataError\ndef f():\n    import torch\n"
    assert list(imports_of(source, "minimind.data.cache")) == [
        Import("minimind.data.shards", 1, on_load=True),
        Import("minimind.errors", 2, on_load=True),
        Import("torch", 4, on_load=False),
    ]
    wrong = [Import("minimind.training.trainer", 7, on_load=True)]
    assert upward("minimind.data.cache", wrong) == ["minimind.data.cache:7 imports minimind.training.trainer"]
    assert not upward("minimind.training.trainer", [Import("minimind.data.cache", 7, on_load=True)])
    assert upward("minimind.checkpoint.store", [Import("minimind", 7, on_load=True)])
