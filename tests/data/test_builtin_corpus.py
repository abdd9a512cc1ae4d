"""The text every Python carries: present, in one order, and its fingerprint changes with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minimind.data import builtin_corpus as embedded
from minimind.data.builtin_corpus import builtin_documents, builtin_fingerprint


def stand_in_for_python(monkeypatch, library: Path) -> None:
    """Make `library` Python's standard library for the corpus alone: coverage asks the real `sysconfig`."""
    monkeypatch.setattr(embedded, "sysconfig", SimpleNamespace(get_paths=lambda: {"stdlib": str(library)}))


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library in place of that of Python, and no language reference."""
    stand_in_for_python(monkeypatch, tmp_path)
    monkeypatch.setattr(embedded, "_topics", lambda: [])

    def write(name: str, source: str | bytes) -> None:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(source if isinstance(source, bytes) else source.encode())

    return write


def prose(word: str) -> str:
    return " ".join([word] * 60)


def test_python_carries_some_megabytes_of_prose():
    documents = list(builtin_documents())
    assert len(documents) > 500
    assert 1_000_000 < sum(len(text.encode()) for text in documents) < 20_000_000
    assert any("Abstract Syntax Trees" in text or 'The "while" statement' in text for text in documents)
    assert len(set(documents)) == len(documents)


def test_a_topic_that_is_part_of_another_one_is_dropped(monkeypatch, tmp_path):
    stand_in_for_python(monkeypatch, tmp_path)
    loop = f"{prose('loop')}\n\n{prose('break')}"
    whole = f"Statements\n**********\n\n{prose('if')}\n\nLoops\n=====\n\n{loop}\n\n{prose('with')}"
    other = f"Loops\n*****\n\n{loop}\n\n{prose('else')}"
    topics = {"for": f"Loops\n*****\n\n{loop}", "if": whole, "else": other, "head": "Heading only"}
    monkeypatch.setattr(embedded, "_topics", lambda: sorted(topics.items()))
    assert list(builtin_documents()) == [other, "Heading only", whole]


def test_no_topic_of_python_is_part_of_another_one():
    topics = embedded._without_parts([text.strip() for _, text in embedded._topics()])
    paragraphs = [set(text.split("\n\n")[1:]) for text in topics]
    parts = [a for a in paragraphs for b in paragraphs if a is not b and a and a <= b]
    assert parts == []


def test_order_and_fingerprint_are_the_same_in_another_process():
    script = (
        "import hashlib; from minimind.data.builtin_corpus import *; "
        "print(hashlib.sha256(repr(list(builtin_documents())).encode()).hexdigest(), builtin_fingerprint())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(embedded.__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1
    assert builtin_fingerprint() in runs.pop()


def test_a_module_and_each_of_its_classes_are_documents(library):
    library(
        "pkg/__init__.py",
        f'''"""{prose("module")}

            Indented.
        """
def function():
    """Of the function."""
    def inner():
        """Unseen."""
class Thing:
    """{prose("thing")}"""
    async def method(self):
        """Of the method."""
    class Inner:
        """Of the inner class."""
''',
    )
    assert list(builtin_documents()) == [
        f"pkg\n\n{prose('module')}\n\nIndented.\n\n\npkg.function\n\nOf the function.",
        f"pkg.Thing\n\n{prose('thing')}\n\n\npkg.Thing.method\n\nOf the method."
        "\n\n\npkg.Thing.Inner\n\nOf the inner class.",
    ]


def test_tests_tables_packages_and_tiny_documents_are_skipped(library):
    for name in ("test/a.py", "encodings/b.py", "site-packages/c.py", "config-3.12/d.py", "x/tests/e.py"):
        library(name, f'"""{prose(name)}"""')
    library("tiny.py", '"""Too small."""')
    library("kept.py", f'"""{prose("kept")}"""')
    assert list(builtin_documents()) == [f"kept\n\n{prose('kept')}"]


def test_a_docstring_met_before_is_skipped(library):
    library("a.py", f'"""{prose("same")}"""')
    library("b.py", f'"""{prose("same")}"""')
    assert list(builtin_documents()) == [f"a\n\n{prose('same')}"]


def test_sources_that_cannot_be_read_are_skipped(library, recwarn):
    library("broken.py", "def (:")
    library("binary.py", b"\x00\xff\xfe")
    library("escape.py", f'"""{prose("odd")} \\d"""')
    assert list(builtin_documents()) == [f"escape\n\n{prose('odd')} \\d"]
    assert not recwarn.list


def test_without_a_library_or_a_reference_there_is_what_is_left(tmp_path, monkeypatch):
    stand_in_for_python(monkeypatch, tmp_path / "python.zip")
    topics = list(builtin_documents())
    assert 50 < len(topics) < 200
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert list(builtin_documents()) == []
    assert builtin_fingerprint() == builtin_fingerprint()


def test_fingerprint_changes_with_the_sources(library, tmp_path):
    library("a.py", f'"""{prose("one")}"""')
    before = builtin_fingerprint()
    assert builtin_fingerprint() == before
    library("a.py", f'"""{prose("another")}"""')
    assert builtin_fingerprint() != before
    changed = builtin_fingerprint()
    library("b.py", "")
    assert builtin_fingerprint() != changed
    changed = builtin_fingerprint()
    os.utime(tmp_path / "b.py", (0, 0))
    assert builtin_fingerprint() != changed


def test_the_fingerprint_reads_no_file_and_walks_no_installed_packages(library, tmp_path, monkeypatch):
    library("a.py", f'"""{prose("one")}"""')
    library("site-packages/pkg/deep/b.py", "")
    walked = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: walked.append(str(folder)) or scan(folder))
    monkeypatch.setattr(Path, "open", None)
    builtin_fingerprint()
    assert walked == [str(tmp_path)]
