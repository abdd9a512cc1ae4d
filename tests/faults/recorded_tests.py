"""Runs tests in scratch copies of the repository, and records which tests execute which line."""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import tomllib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_operators import PACKAGE
from forked_pool import Pool

ROOT = Path(__file__).resolve().parents[2]
# What lies beside the sources at the top of a working tree.
IGNORED = ("build", "dist", "out*", "runs", "shared")
# A test that takes this many times its recorded time hangs, and so notices the fault.
SLOWDOWN, SHORTEST_LIMIT = 10, 40
# Exit code of pytest.
NO_TESTS = 5

# A process that a test starts records too, under the name of the test.
SITECUSTOMIZE = """
import os
if "PLANT_FAULTS_RECORD" in os.environ:
    import atexit, coverage
    recorder = coverage.Coverage(
        os.environ["PLANT_FAULTS_RECORD"], data_suffix=True, config_file=False, include=["*/minimind/*"],
        context=os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0] or None,
    )
    recorder.start()
    atexit.register(lambda: (recorder.stop(), recorder.save()))
"""


class Tree:
    """A scratch copy of the repository, with the folder that its packages are imported from."""

    def __init__(self, folder: Path, original: Path) -> None:
        self.folder, self.repository, self.path = folder, folder / "repository", folder / "path"
        shutil.copytree(original, self.repository, ignore=_ignored)
        self.path.mkdir()
        project = tomllib.loads((original / "pyproject.toml").read_text(encoding="utf-8"))
        places = project.get("tool", {}).get("setuptools", {}).get("package-dir", {PACKAGE: PACKAGE})
        for name, place in places.items():
            (self.path / name).symlink_to(self.repository / place)
        (self.path / "sitecustomize.py").write_text(SITECUSTOMIZE)

    def write(self, file: str, source: str) -> None:
        path = self.repository / file
        path.write_text(source, encoding="utf-8")
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()


def _ignored(folder: str, names: list[str]) -> set[str]:
    patterns = (".git", ".*_cache", ".hypothesis", ".venv", *(IGNORED if Path(folder) == ROOT else ()))
    return {name for pattern in patterns for name in fnmatch.filter(names, pattern)}


class Watcher:
    """A pytest plugin: selects and orders tests, times and limits them, and names them to `coverage`."""

    def __init__(self, tests: list[str] | None, limits: dict[str, float], recorder: Any) -> None:
        self._order = None if tests is None else {test: number for number, test in enumerate(tests)}
        self._limits, self._recorder = limits, recorder
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: list[str] = []
        self.skipped: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self._order is not None:
            chosen = [item for item in items if item.nodeid in self._order]
            items[:] = sorted(chosen, key=lambda item: self._order[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        # Ends the process, whatever it is waiting for.
        signal.alarm(int(max(SHORTEST_LIMIT, SLOWDOWN * self._limits.get(nodeid, 30))))
        if self._recorder is not None:
            self._recorder.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)
        if report.skipped:
            self.skipped.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        signal.alarm(0)


def run_pytest(tree: Tree, work: Path, files: list[str], **how: Any) -> dict[str, Any]:
    """Run tests in this process, a forked one, and return what became of them.

    Args:
        tree: where.
        work: an empty folder for all that the tests write outside their own folders.
        files: test files, relative to the repository.
        how: `tests` to select, in order; `limits`, their recorded seconds; `record`, the file for `coverage`.
    """
    _enter(tree, work)
    recorder = None
    if how.get("record"):
        import coverage

        os.environ["PLANT_FAULTS_RECORD"] = how["record"]
        recorder = coverage.Coverage(
            how["record"], include=["*/minimind/*"], data_suffix=True, config_file=False
        )
        recorder.start()
    import pytest

    watcher = Watcher(how.get("tests"), how.get("limits", {}), recorder)
    options = ["-q", "-m", "not slow", "-o", "addopts=", "-p", "no:xdist", "-p", "no:cacheprovider"]
    options += [f"--rootdir={tree.repository}", f"--basetemp={work / 'tests'}"]
    options += ["--hypothesis-seed=0"] if importlib.util.find_spec("hypothesis") else []
    options += ["-x"] if how.get("stop") else []
    code = int(pytest.main([*options, *files], plugins=[watcher]))
    if recorder is not None:
        recorder.stop()
        recorder.save()
    return {"code": code, "seconds": watcher.seconds, "failed": watcher.failed, "skipped": [*watcher.skipped]}


def _enter(tree: Tree, work: Path) -> None:
    """Make this process, and those it starts, import the packages of `tree` and write below `work`."""
    (work / "tmp").mkdir()
    os.chdir(tree.repository)
    # Neither the working tree nor the folder of this script.
    hidden = [
        path for path in sys.path if (Path(path) / PACKAGE).exists() or Path(path).resolve() == ROOT / "tests"
    ]
    sys.path[:] = [str(tree.path), *(path for path in sys.path if path not in hidden)]
    importlib.invalidate_caches()
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path in sys.path]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tree.path), *inherited])
    os.environ["XDG_CACHE_HOME"], os.environ["TMPDIR"] = str(work / "cache"), str(work / "tmp")
    tempfile.tempdir = None


@dataclass
class Record:
    """Results of one run of the tests.

    Attributes:
        seconds: of each test that passed.
        lines: the tests that execute a line, by file and line.
        skipped: tests that skipped themselves.
        failed: tests that fail without a fault; they are not run.
    """

    seconds: dict[str, float]
    lines: dict[str, dict[int, set[str]]]
    skipped: set[str]
    failed: set[str]


def record(tree: Tree, pool: Pool, files: list[str], folder: Path) -> Record:
    """Run all tests once."""
    has_coverage = importlib.util.find_spec("coverage") is not None
    data = str(folder / "coverage") if has_coverage else None
    found = Record({}, defaultdict(lambda: defaultdict(set)), set(), set())
    crashed: list[str] = []

    def done(result: dict[str, Any], _: int) -> None:
        found.seconds.update(result.get("seconds", {}))
        found.skipped.update(result.get("skipped", ()))
        found.failed.update(result.get("failed", ()))
        if "seconds" not in result:
            crashed.append(str(result["code"]))

    for file in sorted(files, key=lambda name: -(tree.repository / name).stat().st_size):
        pool.submit(lambda _, work, file=file: run_pytest(tree, work, [file], record=data), done, 900)
    pool.wait()
    suspects, found.failed = sorted(found.failed), set()
    if suspects:
        # Slower under `coverage`, or beside other tests.
        names = sorted({test.partition("::")[0] for test in suspects})
        pool.submit(lambda _, work: run_pytest(tree, work, names, tests=suspects), done, 900)
        pool.wait()
    for test in found.failed | found.skipped:
        found.seconds.pop(test, None)
    if has_coverage:
        _read_coverage(folder, tree, found)
    if crashed:
        print(f"{len(crashed)} test files ended early: {crashed}")
    return found


def recorded(tree: Tree, pool: Pool, files: list[str], folder: Path, kept: Path | None) -> Record:
    """Return the record kept in a file if it is one of these sources and tests, else record and keep it."""
    sources = [path.read_bytes() for path in sorted(tree.repository.rglob("*.py"))]
    digest = hashlib.sha256(b"".join(sources) + repr(files).encode()).hexdigest()
    if kept is not None and kept.exists():
        data = json.loads(kept.read_text())
        if data["digest"] == digest:
            lines = {
                file: {int(line): {data["tests"][i] for i in tests} for line, tests in table.items()}
                for file, table in data["lines"].items()
            }
            return Record(data["seconds"], lines, set(data["skipped"]), set(data["failed"]))
    found = record(tree, pool, files, folder)
    if kept is not None:
        numbers = {test: i for i, test in enumerate(found.seconds)}
        data = {"digest": digest, "tests": [*numbers], "seconds": found.seconds}
        data |= {"skipped": sorted(found.skipped), "failed": sorted(found.failed)}
        data["lines"] = {
            file: {line: sorted(numbers[test] for test in tests) for line, tests in table.items()}
            for file, table in found.lines.items()
        }
        kept.write_text(json.dumps(data))
    return found


def _read_coverage(folder: Path, tree: Tree, found: Record) -> None:
    from coverage import CoverageData

    root = tree.repository.resolve()
    for part in folder.glob("coverage.*"):
        data = CoverageData(str(part))
        data.read()
        for name in data.measured_files():
            path = Path(name).resolve()
            if not path.is_relative_to(root / PACKAGE):
                continue
            lines = found.lines[path.relative_to(root).as_posix()]
            for line, tests in data.contexts_by_lineno(name).items():
                lines[line].update(test for test in tests if test in found.seconds)
