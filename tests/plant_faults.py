"""Plant single-line faults in the library and count those that the default tests catch.

    python tests/plant_faults.py --number 300 --jobs 16

Every fault is planted in a scratch copy of the repository, never in the working tree. One recorded run of the
tests (with `coverage`, where it is installed) tells which tests execute which line; a fault runs those tests,
the fastest first, until one fails. Without a record of a line the test files that name its module run.
The choice of faults depends on `--seed` and on the source alone.

The parent imports torch once and forks a child for each test run, so that a fault costs its tests and not
the import. Modules that need a missing package are only faulted where the remaining tests execute them.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import importlib
import importlib.util
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_operators import PACKAGE, Fault, find_faults
from forked_pool import Pool

ROOT = Path(__file__).resolve().parents[1]
IGNORED = shutil.ignore_patterns(
    *(".git", ".*_cache", ".hypothesis", ".venv", "build", "dist", "out*", "runs", "shared")
)
# Imported before the first fork, where they exist.
PRELOADED = ("torch", "accelerate", "transformers", "hypothesis", "numpy", "tensorboard", "typer")
# A test that takes this many times its recorded time hangs, and so notices the fault.
SLOWDOWN, SHORTEST_LIMIT = 20, 60
# Exit code of pytest.
NO_TESTS = 5
# In functions that mention one of these, lines that no test executes are for GPUs.
GPU_CODE = re.compile(r"cuda|nccl|fused")

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
        shutil.copytree(original, self.repository, ignore=IGNORED)
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
    """What one run of the tests told.

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


def tests_for(fault: Fault, found: Record, sources: dict[str, str]) -> list[str]:
    """Return the tests that may notice a fault, the fastest first."""
    lines = found.lines.get(fault.file, {})
    tests = lines.get(fault.line) or lines.get(fault.statement) or set()
    if not tests and fault.function is None:
        # The top of a module runs before any test: those that use the module may notice.
        tests = set().union(*lines.values()) if lines else set()
    if not tests:
        parts = Path(fault.file).with_suffix("").parts
        name = ".".join(parts)
        pattern = re.compile(
            rf"{re.escape(name)}\b|from {re.escape('.'.join(parts[:-1]))} import .*\b{parts[-1]}\b"
        )
        tests = {test for test in found.seconds if pattern.search(sources[test.partition("::")[0]])}
    # Tests of a file together, where they are fast, so that they share what the file sets up.
    quick = sorted(
        (test for test in tests if found.seconds[test] < 1), key=lambda test: test.partition("::")[0]
    )
    slow = sorted((test for test in tests if found.seconds[test] >= 1), key=lambda test: found.seconds[test])
    return quick + slow


def choose(faults: list[Fault], number: int, seed: int, found: Record) -> list[Fault]:
    """Return faults on different lines, in a random order that depends on the seed alone."""
    faults = list(faults)
    random.Random(seed).shuffle(faults)
    chosen: dict[tuple[str, int], Fault] = {}
    for fault in faults:
        if len(chosen) == number:
            break
        if (fault.file, fault.line) not in chosen and not _out_of_reach(fault, found):
            chosen[fault.file, fault.line] = fault
    return list(chosen.values())


def _out_of_reach(fault: Fault, found: Record) -> bool:
    """Whether no test here can execute the line: GPU code, or code that needs a missing package."""
    lines = found.lines.get(fault.file, {})
    if not found.lines or fault.function is None or lines.get(fault.line) or lines.get(fault.statement):
        return False
    source = (ROOT / fault.file).read_text(encoding="utf-8").splitlines()
    if GPU_CODE.search("\n".join(source[fault.function[0] - 1 : fault.function[1]])):
        return True
    imported = re.findall(r"^\s*(?:import|from) (\w+)", "\n".join(source), re.MULTILINE)
    return any(importlib.util.find_spec(name) is None for name in set(imported) - {"minimind_cli"})


def plant(
    fault: Fault, tree: Tree, work: Path, tests: list[str], seconds: dict[str, float]
) -> dict[str, Any]:
    """Run the tests of a fault in a tree, and put the line back."""
    path = tree.repository / fault.file
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    ending = lines[fault.line - 1][len(lines[fault.line - 1].rstrip("\r\n")) :]
    lines[fault.line - 1] = fault.after + ending
    tree.write(fault.file, "".join(lines))
    # A module compiled with one fault must not outlast it.
    sys.dont_write_bytecode = True
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    if not files:
        return {"code": NO_TESTS}
    return run_pytest(tree, work, files, tests=tests, limits=seconds, stop=True)


def table(outcomes: dict[Fault, str]) -> str:
    """Return the counts of each package as Markdown."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for fault, outcome in outcomes.items():
        for package in (Path(fault.file).parent.as_posix().replace("/", "."), "all"):
            counts[package].update(("planted", outcome))
    rows = ["| package | planted | caught | survived | caught, % |", "|---|---:|---:|---:|---:|"]
    for package in sorted(counts, key=lambda name: (name == "all", name)):
        n = counts[package]
        share = 100 * n["caught"] / n["planted"]
        rows.append(f"| {package} | {n['planted']} | {n['caught']} | {n['survived']} | {share:.1f} |")
    return "\n".join(rows)


def measure(options: argparse.Namespace, scratch: Path) -> dict[Fault, str]:
    """Record the tests, plant the faults, and print those that survive."""
    base = Tree(scratch / "base", ROOT)
    compileall.compile_dir(str(base.repository), quiet=2)
    pool = Pool(options.jobs, scratch)
    paths = [base.repository / name for name in options.tests]
    tests = sorted({f for path in paths for f in ([path] if path.is_file() else path.rglob("test_*.py"))})
    files = [path.relative_to(base.repository).as_posix() for path in tests]
    began = time.monotonic()
    found = record(base, pool, files, scratch)
    print(f"recorded {len(found.seconds)} tests in {time.monotonic() - began:.0f} s", flush=True)
    if not found.seconds:
        sys.exit(f"no test passes here; see python -m pytest in {sys.prefix}")
    if found.failed:
        print("not run, because they fail without a fault:", *sorted(found.failed), sep="\n  ", flush=True)
    trees = [Tree(scratch / f"tree-{slot}", base.repository) for slot in range(options.jobs)]
    sources = {file: (base.repository / file).read_text(encoding="utf-8") for file in files}
    outcomes: dict[Fault, str] = {}
    for fault in choose(find_faults(ROOT, options.only), options.number, options.seed, found):
        selected, total = [], 0.0
        for test in tests_for(fault, found, sources):
            total += found.seconds[test]
            if total <= options.seconds:
                selected.append(test)

        def work(
            slot: int, folder: Path, fault: Fault = fault, selected: list[str] = selected
        ) -> dict[str, Any]:
            return plant(fault, trees[slot], folder, selected, found.seconds)

        def done(result: dict[str, Any], slot: int, fault: Fault = fault, count: int = len(selected)) -> None:
            trees[slot].write(fault.file, (base.repository / fault.file).read_text(encoding="utf-8"))
            survived = result["code"] in (0, NO_TESTS)
            outcomes[fault] = "survived" if survived else "caught"
            if survived:
                print(f"{fault.file}:{fault.line} survived {count} tests", flush=True)
                print(f"  - {fault.before.strip()}\n  + {fault.after.strip()}", flush=True)
            elif options.verbose:
                by = (result.get("failed") or [result["code"]])[0]
                print(f"{fault.file}:{fault.line} caught by {by}: {fault.after.strip()}", flush=True)

        pool.submit(work, done, SHORTEST_LIMIT + SLOWDOWN * min(total, options.seconds))
    pool.wait()
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=300, help="faults to plant")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of faults")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="tests run at a time")
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of paths, such as minimind/data")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="folders or files of tests")
    parser.add_argument("--seconds", type=float, default=120, help="recorded time of the tests of one fault")
    parser.add_argument("--minimum", type=float, default=0.0, help="share to catch; exit code 1 below it")
    parser.add_argument("--verbose", action="store_true", help="name the test that catches each fault")
    options = parser.parse_args()
    began = time.monotonic()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ.setdefault("MINIMIND_SHARED", str(ROOT.parent / "shared"))
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        outcomes = measure(options, Path(scratch))
    caught = sum(outcome == "caught" for outcome in outcomes.values())
    print(f"\n{table(outcomes)}\n\nin {time.monotonic() - began:.0f} s with {options.jobs} jobs")
    return int(caught < options.minimum * len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
