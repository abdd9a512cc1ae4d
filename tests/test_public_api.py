"""What users import and install: docs and examples use public modules only, and name the right packages."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import minimind

ROOT = Path(__file__).parents[1]
# The one list of public modules: what the pages of the API reference show.
REFERENCE = sorted((ROOT / "docs" / "api").glob("*.md"))
SHOWN = [name for page in REFERENCE for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.M)]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
# `minimind` on the package index is somebody else's project.
SOMEBODY_ELSES = re.compile(
    r"\bminimind\[[a-z,]+\]|\b(?:pip|pipx|uv)3? (?:\w+ )*(?:-\S+ )*['\"]?minimind(?![-\w/])", re.I
)


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


PUBLIC = {"minimind", *filter(is_module, SHOWN)}


def imports(code: str) -> Iterator[tuple[str, str | None]]:
    """Yield each module of minimind that code imports, with the name that is taken from it."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        yield from ((module, name) for module, name in found if module.split(".")[0].startswith("minimind"))


def not_public(code: str) -> list[str]:
    """Return the imports that use anything but the public API."""
    wrong = []
    for module, name in imports(code):
        if name is not None and f"{module}.{name}" in PUBLIC:
            continue
        known = name is None or not name.startswith("_")
        if module == "minimind" and name is not None:
            known = name in minimind.__all__
        if module not in PUBLIC or not known:
            wrong.append(module if name is None else f"{module}.{name}")
    return wrong


@pytest.mark.parametrize("name", SHOWN)
def test_the_reference_shows_what_exists(name: str) -> None:
    if is_module(name):
        assert importlib.import_module(name).__doc__
        return
    module, _, attribute = name.rpartition(".")
    assert getattr(importlib.import_module(module), attribute) is getattr(minimind, attribute)
    assert attribute in minimind.__all__


def python_blocks(page: Path) -> list[str]:
    # Those of a list are indented.
    return re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_docs_import_public_modules_only(page: Path) -> None:
    assert [wrong for block in python_blocks(page) for wrong in not_public(block)] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_import_public_modules_only(example: Path) -> None:
    assert not_public(example.read_text("utf-8")) == []


def test_modules_named_in_the_docs_are_public() -> None:
    text = (ROOT / "docs" / "python-api.md").read_text("utf-8")
    named = set(re.findall(r"`(minimind(?:\.\w+)+)", text))
    assert named
    modules = {name for name in named if is_module(name)}
    # A function is named with its module.
    owners = {name.rpartition(".")[0] for name in named - modules}
    assert (modules | owners) - PUBLIC == set()


def test_a_private_import_would_be_noticed() -> None:
    assert not_public("import minimind\nfrom minimind import pretrain, preset_config") == []
    assert not_public("from minimind import _PUBLIC") == ["minimind._PUBLIC"]
    assert not_public("import minimind.errors_of_mine") == ["minimind.errors_of_mine"]
    assert not_public("from minimind_cli.app import main") == ["minimind_cli.app.main"]
    assert len(PUBLIC) > 20
    assert sum(len(python_blocks(page)) for page in PAGES) > 10


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("pip install minimind", True),
        ("pip install -U 'minimind[gguf]'", True),
        ("needs pyarrow; pip install 'minimind[parquet]'.", True),
        ("uv pip install minimind", True),
        ("pip install minimind-train", False),
        ("pip install '.[gguf]'", False),
        ("pip install dist/minimind_train-0.2.0-py3-none-any.whl", False),
        ("--tokenizer minimind/model", False),
        ("minimind[0]", False),
    ],
)
def test_a_command_that_installs_another_project_is_recognized(text: str, wrong: bool) -> None:
    assert bool(SOMEBODY_ELSES.search(text)) == wrong


def test_no_message_or_page_installs_another_project() -> None:
    sources = [path for folder in ("minimind", "cli", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in [*PAGES, *sources]
        for match in SOMEBODY_ELSES.finditer(path.read_text("utf-8"))
    ]
    assert found == []


def test_the_distribution_is_minimind_train() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["name"] == "minimind-train"
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {project['version']}\n" in citation


def test_the_test_extra_replaces_no_part_of_pytorch() -> None:
    """README's commands install it beside a CUDA build, whose triton it must leave alone."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    replacing = {
        extra
        for extra, requirements in extras.items()
        for requirement in requirements
        if re.match(r"(torch|triton|nvidia-\S+)\b", requirement)
    }
    assert replacing == {"interpreter"}
