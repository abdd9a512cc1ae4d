"""The corpus embedded in every Python installation: the language reference and the library's docstrings.

A run without `--data` trains on it, so a first model needs no download. It is about 2 MB of English prose on
one subject.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Increase when the same sources give other documents, which invalidates cached tokens.
_REVISION = 2
# Tests and tables contain little prose; installed packages are not part of Python.
_SKIPPED = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo", "ensurepip"}
    | {"site-packages", "dist-packages"}
)
_SMALLEST_DOCUMENT = 200

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def builtin_documents() -> Iterator[str]:
    """Yield the documents, in the same order on every call.

    First the topics of the language reference (`help("while")`), then one document for each library module
    (its docstring and those of its functions) and one for each class with its methods. Topics that are part
    of another one, repeated docstrings and documents below 200 characters are dropped: a validation document
    must not be training text as well. A Python library in an archive or without sources has fewer documents,
    possibly none.
    """
    yield from _without_parts([text.strip() for _, text in _topics()])
    seen: set[str] = set()
    for name, file in _library():
        for sections in _documents(name, file):
            fresh = [(title, text) for title, text in sections if text not in seen]
            seen.update(text for _, text in fresh)
            if sum(len(text) for _, text in fresh) >= _SMALLEST_DOCUMENT:
                yield "\n\n\n".join(f"{title}\n\n{text}" for title, text in fresh)


def builtin_fingerprint() -> str:
    """Return a hash (hex) of the path, size and modification time of all source files.

    Reading the files instead would cost half a second at every start of a run.
    """
    digest = hashlib.sha256(f"{_REVISION} {sys.version_info[:3]}".encode())
    for name, text in _topics():
        digest.update(f"\0{name}\0{text}".encode())
    for _, file in _library():
        status = file.stat()
        digest.update(f"\0{file}\0{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _topics() -> list[tuple[str, str]]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package it separately
        return []
    return sorted(topics.items())


def _without_parts(texts: list[str]) -> list[str]:
    """Drop what is, but for its heading, part of a longer text, as `while` is of the compound statements."""
    paragraphs = {text: set(text.split("\n\n")[1:]) for text in texts}
    return [
        text
        for text, own in paragraphs.items()
        if not own or not any(len(other) > len(text) and own <= its for other, its in paragraphs.items())
    ]


def _library() -> list[tuple[str, Path]]:
    """Return the dotted names and files of the library's modules, sorted by name."""
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for folder, folders, files in os.walk(root):
        # Do not walk installed packages, which may be a hundred times the library.
        folders[:] = filter(_is_read, folders)
        above = Path(folder).relative_to(root).parts
        for name in files:
            stem, suffix = os.path.splitext(name)
            if suffix == ".py" and _is_read(stem):
                parts = above if stem == "__init__" else (*above, stem)
                found.append((".".join(parts), Path(folder, name)))
    return sorted(found)


def _is_read(name: str) -> bool:
    # A folder whose name is no identifier, such as config-3.12, contains build files.
    return name not in _SKIPPED and name.isidentifier()


def _documents(module: str, file: Path) -> Iterator[list[tuple[str, str]]]:
    """Yield the sections (title, text) of a module's own document, then those of each of its classes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated escapes in third-party sources
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    yield [*_sections(tree, module, enter_classes=False)]
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield [*_sections(node, f"{module}.{node.name}", enter_classes=True)]


def _sections(node: _Documented, name: str, *, enter_classes: bool) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node, clean=False)
    if docstring and (text := inspect.cleandoc(docstring).strip()):
        yield name, text
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or (
            enter_classes and isinstance(child, ast.ClassDef)
        ):
            yield from _sections(child, f"{name}.{child.name}", enter_classes=enter_classes)
