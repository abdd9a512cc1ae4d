"""Which file may import which: the table of the house, held against the imports in the tree."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Module: its layer, and the modules of the same layer that it may import. Lower layers are open to all.
#   0 standard library   1 torch and numpy   2 accelerate   3 the loop   4 one call   5 the command line
LAYERS: dict[str, tuple[int, str]] = {
    "minimind": (0, ""),
    "minimind.errors": (0, ""),
    "minimind.settings": (0, "errors"),
    "minimind.config": (0, "errors settings wording"),
    "minimind.presets": (0, "errors settings config launch_environment"),
    "minimind.option_words": (0, "settings config presets"),
    "minimind.configuration_page": (0, "settings config presets"),
    "minimind.model_config": (0, "errors"),
    "minimind.schedule": (0, "config"),
    "minimind.batch_plan": (0, "errors config"),
    "minimind.run_folder": (0, "errors settings config"),
    "minimind.metrics_file": (0, "run_folder"),
    "minimind.gpu_peaks": (0, ""),
    "minimind.wording": (0, ""),
    "minimind.parameter_parts": (0, ""),
    "minimind.runs": (0, ""),
    "minimind.runs.environment_text": (0, ""),
    "minimind.runs.info_rows": (0, "wording"),
    "minimind.memory_estimate": (0, "model_config"),
    "minimind.modeling": (1, ""),
    "minimind.modeling.rope": (1, ""),
    "minimind.modeling.kv_cache": (1, ""),
    "minimind.modeling.kernels": (1, ""),
    "minimind.modeling.attention_kernels": (1, ""),
    "minimind.modeling.documents": (1, ""),
    "minimind.modeling.fused_ops": (1, "modeling.documents modeling.kernels modeling.attention_kernels"),
    "minimind.modeling.fused": (1, "modeling.fused_ops"),
    "minimind.modeling.attention": (1, "modeling.rope modeling.kv_cache modeling.documents modeling.fused"),
    "minimind.modeling.feed_forward": (1, "modeling.fused"),
    "minimind.modeling.loss": (1, "modeling.fused"),
    "minimind.modeling.moe": (1, "modeling.fused"),
    "minimind.modeling.transformer": (
        1,
        "modeling.rope modeling.kv_cache modeling.attention modeling.documents modeling.feed_forward "
        "modeling.fused modeling.loss modeling.moe",
    ),
    "minimind.modeling.projection": (1, ""),
    "minimind.modeling.decoder": (
        1,
        "modeling.feed_forward modeling.kv_cache modeling.projection modeling.rope modeling.transformer",
    ),
    "minimind.sampling": (1, ""),
    "minimind.tokenizer": (1, ""),
    "minimind.data": (1, ""),
    "minimind.data.embedded": (1, ""),
    "minimind.data.sources": (1, ""),
    "minimind.data.document_index": (1, ""),
    "minimind.data.shards": (1, "data.document_index"),
    "minimind.data.report": (1, ""),
    "minimind.data.cache": (1, ""),
    "minimind.data.random_tokens": (1, "data.shards"),
    "minimind.data.encode": (1, "data.sources data.shards tokenizer"),
    "minimind.data.prepare": (
        1,
        "data.cache data.document_index data.embedded data.encode data.entries data.mixture data.report "
        "data.shards data.sources tokenizer",
    ),
    "minimind.data.entries": (1, "data.sources"),
    "minimind.data.sampler": (1, "data.shards"),
    "minimind.data.mixture": (1, "data.document_index data.sampler data.shards"),
    "minimind.data.packing": (1, "data.sampler data.shards"),
    "minimind.data.steps": (1, "data.mixture data.packing data.sampler data.shards"),
    "minimind.data.windows": (1, "data.packing data.shards"),
    "minimind.data.prefetch": (1, ""),
    "minimind.data.loader": (
        1,
        "data.mixture data.packing data.prefetch data.sampler data.shards data.steps",
    ),
    "minimind.readback": (1, ""),
    "minimind.stopping": (0, ""),
    "minimind.garbage": (0, ""),
    "minimind.profile_trace": (1, ""),
    "minimind.muon_kernels": (1, ""),
    "minimind.muon": (1, "muon_kernels"),
    "minimind.optim": (1, "muon"),
    "minimind.throughput": (1, ""),
    "minimind.durable_files": (1, ""),
    "minimind.new_folder": (1, "durable_files"),
    "minimind.stored_checkpoint": (1, "durable_files"),
    "minimind.weight_header": (1, ""),
    "minimind.runs.record": (1, "stored_checkpoint"),
    "minimind.runs.info": (
        1,
        "runs.record stored_checkpoint weight_header",
    ),
    "minimind.runs.comparison": (1, "runs.info runs.record"),
    "minimind.runs.comparison_page": (1, "runs.comparison runs.record"),
    "minimind.checkpoint": (1, "durable_files stored_checkpoint"),
    "minimind.launch_environment": (0, "config"),
    "minimind.roll_call": (1, ""),
    "minimind.turns": (1, "roll_call"),
    "minimind.launch": (2, ""),
    "minimind.ranks": (2, ""),
    "minimind.training_state": (2, ""),
    "minimind.resume": (2, "training_state"),
    "minimind.tracker_clients": (2, "environment"),
    "minimind.trackers": (2, "tracker_clients"),
    "minimind.progress": (2, ""),
    "minimind.environment": (2, ""),
    "minimind.runs.changes_since": (2, "environment"),
    "minimind.runs.reproduction": (2, "runs.changes_since launch"),
    "minimind.evaluation": (2, ""),
    "minimind.expert_balance": (2, ""),
    "minimind.generation": (2, ""),
    "minimind.formats": (2, ""),
    "minimind.formats.expert_names": (2, ""),
    "minimind.formats.weight_files": (2, ""),
    "minimind.formats.qwen3": (2, "formats.expert_names formats.weight_files"),
    "minimind.formats.upstream": (2, "formats.qwen3"),
    "minimind.formats.gguf_vocabulary": (2, ""),
    "minimind.formats.gguf": (2, "formats.gguf_vocabulary"),
    "minimind.model_source": (2, "formats.qwen3 formats.upstream"),
    "minimind.starting_model": (2, "formats.qwen3 model_source"),
    "minimind.text_generation": (2, "generation"),
    "minimind.samples": (2, "formats.qwen3 text_generation training_state"),
    "minimind.delivery": (
        2,
        "formats.qwen3 formats.weight_files samples text_generation training_state",
    ),
    "minimind.overview": (2, ""),
    "minimind.spikes": (2, ""),
    "minimind.pass_graph": (2, ""),
    "minimind.train_state": (2, ""),
    "minimind.run_checkpoints": (2, "progress resume trackers train_state training_state"),
    "minimind.export": (3, ""),
    "minimind.train": (3, ""),
    "minimind.prepared_model": (3, "train"),
    "minimind.decay": (4, "pretrain"),
    "minimind.speed_trial": (4, ""),
    "minimind.auto_batch": (4, "speed_trial"),
    "minimind.pretrain": (4, "auto_batch"),
    "minimind.text_evaluation": (4, ""),
    "minimind.resume_check": (4, "pretrain"),
    "minimind.benchmark": (4, "auto_batch"),
    "minimind.run_plan": (4, "benchmark"),
    "minimind.planning": (4, "auto_batch benchmark pretrain run_plan"),
    "minimind_cli": (5, ""),
    "minimind_cli.help": (5, ""),
    "minimind_cli.options": (5, "minimind_cli.help"),
    "minimind_cli.examples": (5, ""),
    "minimind_cli.upstream_flags": (5, "minimind_cli.options"),
    "minimind_cli.pretrain": (5, "minimind_cli.options minimind_cli.upstream_flags"),
    "minimind_cli.bench": (5, "minimind_cli.options minimind_cli.pretrain"),
    "minimind_cli.decay": (5, "minimind_cli.options minimind_cli.pretrain"),
    "minimind_cli.tokens": (5, "minimind_cli.examples minimind_cli.help minimind_cli.options"),
    "minimind_cli.checkpoints": (5, "minimind_cli.options"),
    "minimind_cli.export": (5, "minimind_cli.options"),
    "minimind_cli.info": (5, ""),
    "minimind_cli.compare": (5, ""),
    "minimind_cli.reproduce": (5, ""),
    "minimind_cli.evaluate": (5, "minimind_cli.options"),
    "minimind_cli.generate": (5, "minimind_cli.options"),
    "minimind_cli.verify_resume": (
        5,
        "minimind_cli.options minimind_cli.pretrain minimind_cli.upstream_flags",
    ),
    "minimind_cli.app": (
        5,
        "minimind_cli.options minimind_cli.bench minimind_cli.pretrain minimind_cli.tokens "
        "minimind_cli.checkpoints minimind_cli.compare minimind_cli.decay minimind_cli.evaluate "
        "minimind_cli.examples minimind_cli.export minimind_cli.generate minimind_cli.help minimind_cli.info "
        "minimind_cli.reproduce minimind_cli.verify_resume",
    ),
    "minimind_cli.__main__": (5, "minimind_cli.app"),
}

# Layer 1 modules that do without torch, besides all of layer 0 and the command line.
TORCH_FREE = {
    "minimind.stored_checkpoint",
    "minimind.weight_header",
    "minimind.runs.record",
    "minimind.runs.info",
    "minimind.runs.comparison",
    "minimind.runs.comparison_page",
    "minimind.tokenizer",
    "minimind.data",
    "minimind.data.embedded",
    "minimind.data.sources",
    "minimind.data.shards",
    "minimind.data.random_tokens",
    "minimind.data.report",
    "minimind.data.cache",
    "minimind.data.encode",
    "minimind.data.prepare",
    "minimind.data.document_index",
    "minimind.data.entries",
    "minimind.data.sampler",
    "minimind.data.mixture",
    "minimind.data.packing",
    "minimind.data.steps",
    "minimind.data.windows",
}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "manager", "misc", "common"}


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
KNOWN = sorted(MODULES.keys() & LAYERS.keys())


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
                yield Import(inner if inner in LAYERS else origin, node.lineno, node not in late)


@cache
def imports(module: str) -> tuple[Import, ...]:
    """Return the imports of a module in the tree."""
    path = MODULES[module]
    is_package = path.name == "__init__.py"
    return tuple(imports_of(path.read_text(encoding="utf-8"), module, is_package=is_package))


def ours(name: str) -> bool:
    return name.split(".")[0] in ("minimind", "minimind_cli")


def third_party(name: str) -> bool:
    return not ours(name) and name.split(".")[0] not in sys.stdlib_module_names


def may_import(module: str, target: str) -> bool:
    layer, neighbours = LAYERS[module]
    if LAYERS[target][0] < layer:
        return True
    return target.removeprefix("minimind.") in neighbours.split()


def test_every_file_stands_in_the_table() -> None:
    unknown = sorted(MODULES.keys() - LAYERS.keys())
    assert not unknown, f"add {', '.join(unknown)} with a layer to LAYERS in tests/test_layers.py"


# The package itself only names what it loads on first use.
@pytest.mark.parametrize("module", [name for name in KNOWN if name != "minimind"])
def test_a_file_imports_only_what_its_layer_allows(module: str) -> None:
    wrong = []
    for item in imports(module):
        if ours(item.target):
            assert item.target in LAYERS, f"{MODULES[module]}:{item.line} imports the unknown {item.target}"
            if not may_import(module, item.target):
                wrong.append(f"{MODULES[module]}:{item.line} imports {item.target}")
    assert not wrong, "move it to another layer, or name the neighbour in LAYERS: " + "; ".join(wrong)


def test_nothing_imports_in_a_circle() -> None:
    graph = {
        module: {item.target for item in imports(module) if ours(item.target) and item.target != module}
        for module in MODULES.keys() - {"minimind"}
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", KNOWN)
def test_a_file_loads_only_the_packages_of_its_layer(module: str) -> None:
    layer = LAYERS[module][0]
    loaded = {
        item.target.split(".")[0] for item in imports(module) if item.on_load and third_party(item.target)
    }
    if layer == 0:
        assert not loaded
    elif layer == 1:
        assert "accelerate" not in loaded
    elif layer == 5:
        assert loaded <= {"typer", "rich"}


@pytest.mark.parametrize(
    "module", [name for name in KNOWN if LAYERS[name][0] in (0, 5) or name in TORCH_FREE]
)
def test_a_torch_free_file_loads_nothing_that_loads_torch(module: str) -> None:
    for item in imports(module):
        if item.on_load:
            where = f"{MODULES[module]}:{item.line}"
            assert item.target.split(".")[0] not in ("torch", "accelerate", "transformers"), where
            if ours(item.target):
                assert LAYERS[item.target][0] in (0, 5) or item.target in TORCH_FREE, where


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert not [path for path in MODULES.values() if VAGUE_NAMES & set(path.stem.split("_"))]


def test_relative_and_late_imports_are_understood() -> None:
    source = "from . import shards\nfrom ..errors import DataError\ndef f():\n    import torch\n"
    assert list(imports_of(source, "minimind.data.encode")) == [
        Import("minimind.data.shards", 1, on_load=True),
        Import("minimind.errors", 2, on_load=True),
        Import("torch", 4, on_load=False),
    ]
    assert not may_import("minimind.data.encode", "minimind.modeling.rope")
    assert not may_import("minimind.config", "minimind.tokenizer")
    assert may_import("minimind.train", "minimind.data.loader")
