"""Plant single-line faults in the library and count those that the default tests catch.

    python tests/faults/plant_faults.py --number 300 --jobs 16

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
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from fault_operators import Fault, find_faults
from forked_pool import Pool
from recorded_tests import NO_TESTS, ROOT, SHORTEST_LIMIT, SLOWDOWN, Record, Tree, recorded, run_pytest

# Imported before the first fork, where they exist.
PRELOADED = ("torch", "accelerate", "transformers", "hypothesis", "numpy", "tensorboard", "typer")
# In functions that mention one of these, lines that no test executes are for GPUs.
GPU_CODE = re.compile(r"cuda|nccl|fused")


class Selection:
    """Chooses the tests that may notice a fault.

    Args:
        found: the recorded run.
        sources: of the test files.
        seconds: recorded time of the tests of one fault.
    """

    def __init__(self, found: Record, sources: dict[str, str], seconds: float) -> None:
        self._found, self._sources, self._seconds = found, sources, seconds
        executed = Counter(
            test.partition("::")[0]
            for table in found.lines.values()
            for tests in table.values()
            for test in tests
        )
        tests = Counter(test.partition("::")[0] for test in found.seconds)
        # Lines that a test of each file executes: the fewer, the more it says about each.
        self._breadth = {file: executed[file] / count for file, count in tests.items()}

    def tests(self, fault: Fault) -> list[str]:
        """Return tests in the order to run: the quick ones file by file, then the slow ones by their time."""
        seconds = self._found.seconds
        reaching = sorted(self._reaching(fault))
        # Quick ones of a file together, so that they share what the file sets up.
        quick = sorted((test for test in reaching if seconds[test] < 1), key=self._rank)
        slow = sorted((test for test in reaching if seconds[test] >= 1), key=seconds.__getitem__)
        chosen = self._within(quick, self._seconds if not slow else self._seconds / 2)
        return chosen + self._within(slow, self._seconds - sum(seconds[test] for test in chosen))

    def executing(self, fault: Fault) -> set[str]:
        """Return the tests that are known to execute the line."""
        lines = self._found.lines.get(fault.file, {})
        return lines.get(fault.line) or lines.get(fault.statement) or set()

    def _reaching(self, fault: Fault) -> set[str]:
        lines, tests = self._found.lines.get(fault.file, {}), self.executing(fault)
        if not tests and fault.function is None:
            # The top of a module runs before any test: those that use the module may notice.
            tests = set().union(*lines.values())
        if tests:
            return tests
        *package, module = Path(fault.file).with_suffix("").parts
        name = re.escape(".".join(package))
        pattern = re.compile(rf"{name}\.{module}\b|from {name} import .*\b{module}\b")
        return {
            test for test in self._found.seconds if pattern.search(self._sources[test.partition("::")[0]])
        }

    def _rank(self, test: str) -> tuple[float, str]:
        file = test.partition("::")[0]
        return self._breadth[file], file

    def _within(self, tests: list[str], limit: float) -> list[str]:
        chosen, total = [], 0.0
        for test in tests:
            total += self._found.seconds[test]
            if total > limit:
                break
            chosen.append(test)
        return chosen


def choose(faults: list[Fault], number: int, seed: int, found: Record, root: Path) -> list[Fault]:
    """Return faults on different lines, in a random order that depends on the seed alone."""
    faults = list(faults)
    random.Random(seed).shuffle(faults)
    chosen: dict[tuple[str, int], Fault] = {}
    for fault in faults:
        if len(chosen) == number:
            break
        if (fault.file, fault.line) not in chosen and not _out_of_reach(fault, found, root):
            chosen[fault.file, fault.line] = fault
    return list(chosen.values())


def _out_of_reach(fault: Fault, found: Record, root: Path) -> bool:
    """Whether no test here can execute the line: GPU code, or code that needs a missing package."""
    lines = found.lines.get(fault.file, {})
    if not found.lines or fault.function is None or lines.get(fault.line) or lines.get(fault.statement):
        return False
    source = (root / fault.file).read_text(encoding="utf-8").splitlines()
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
    found = recorded(base, pool, files, scratch, options.record)
    print(f"recorded {len(found.seconds)} tests in {time.monotonic() - began:.0f} s", flush=True)
    if not found.seconds:
        sys.exit(f"no test passes here; see python -m pytest in {sys.prefix}")
    if found.failed:
        print("not run, because they fail without a fault:", *sorted(found.failed), sep="\n  ", flush=True)
    trees = [Tree(scratch / f"tree-{slot}", base.repository) for slot in range(options.jobs)]
    sources = {file: (base.repository / file).read_text(encoding="utf-8") for file in files}
    outcomes: dict[Fault, str] = {}
    selection = Selection(found, sources, options.seconds)
    faults = find_faults(base.repository, options.only)
    for fault in choose(faults, options.number, options.seed, found, base.repository):
        selected = selection.tests(fault)

        def work(
            slot: int, folder: Path, fault: Fault = fault, selected: list[str] = selected
        ) -> dict[str, Any]:
            return plant(fault, trees[slot], folder, selected, found.seconds)

        def done(result: dict[str, Any], slot: int, fault: Fault = fault, count: int = len(selected)) -> None:
            trees[slot].write(fault.file, (base.repository / fault.file).read_text(encoding="utf-8"))
            survived = result["code"] in (0, NO_TESTS)
            outcomes[fault] = "survived" if survived else "caught"
            if survived:
                executing = len(selection.executing(fault))
                print(
                    f"{fault.file}:{fault.line} survived {count} tests; {executing} in all execute it",
                    flush=True,
                )
                print(f"  - {fault.before.strip()}\n  + {fault.after.strip()}", flush=True)
            elif options.verbose:
                by = (result.get("failed") or [result["code"]])[0]
                print(f"{fault.file}:{fault.line} caught by {by}: {fault.after.strip()}", flush=True)

        pool.submit(work, done, 2 * SHORTEST_LIMIT + SLOWDOWN * sum(found.seconds[test] for test in selected))
    pool.wait()
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=300, help="faults to plant")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of faults")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="tests run at a time")
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of paths, such as minimind/data")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="folders or files of tests")
    parser.add_argument("--seconds", type=float, default=60, help="recorded time of the tests of one fault")
    parser.add_argument("--minimum", type=float, default=0.0, help="share to catch; exit code 1 below it")
    parser.add_argument("--record", type=Path, help="file that keeps the recorded run for the next time")
    parser.add_argument("--verbose", action="store_true", help="name the test that catches each fault")
    options = parser.parse_args()
    began = time.monotonic()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
    # Forked processes cannot share a GPU that their parent has opened, and the default tests need none.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
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
