"""The single-line faults that `plant_faults.py` plants, found in the syntax tree of each module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "minimind"

# Not planted, because no test on a CPU could notice them or because they change no result:
# - files with "kernel" in their name or with `import triton`: the GPU tests cover them;
# - lines that no test executes in a function that mentions CUDA (see `plant_faults.py`): likewise;
# - annotations, decorators, docstrings and `if TYPE_CHECKING`: nothing executes them in a run;
# - what is inside `raise`: an error's text is tested for the option and the fix, not for every number;
# - keywords that bound memory, name threads, check the program or matter on other systems only;
# - a dropped `side="left"` of numpy's searchsorted, which is its default.
NO_FAULT_KEYWORDS = {
    *("strict", "maxsize", "init", "repr", "frozen", "kw_only", "slots"),
    *("encoding", "thread_name_prefix", "pin_memory", "non_blocking", "device"),
}
# Faults that leave every result equal: (line before, line after, reason). Keep it short.
EQUIVALENT: tuple[tuple[str, str, str], ...] = (
    (
        'return np.argsort(philox.random_raw(size), kind="stable").astype(np.int64, copy=False)',
        "return np.argsort(philox.random_raw(size)).astype(np.int64, copy=False)",
        "64 random bits do not tie",
    ),
)

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}


@dataclass(frozen=True)
class Fault:
    """One changed line.

    Attributes:
        file: relative to the root of the repository.
        line: from 1.
        statement: first line of the innermost statement around it.
        function: first and last line of the innermost function around it; None at the top of a module.
        before: the line.
        after: the line with the fault.
    """

    file: str
    line: int
    statement: int
    function: tuple[int, int] | None
    before: str
    after: str


class FaultFinder:
    """Finds the faults of one module."""

    def __init__(self, file: str, source: str) -> None:
        self._file, self._lines = file, source.splitlines()
        self.faults: list[Fault] = []
        self._visit(ast.parse(source), 1, None)

    def _visit(self, node: ast.AST, statement: int, function: tuple[int, int] | None) -> None:
        if isinstance(node, (ast.Raise, ast.Import, ast.ImportFrom)) or _not_executed(node):
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = (node.lineno, node.end_lineno or node.lineno)
        if isinstance(node, ast.stmt):
            statement = node.lineno
        for place, text in self._replacements(node, in_function=function is not None):
            self._add(place, text, statement, function)
        for name, child in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list", "type_params"):
                for one in child if isinstance(child, list) else [child]:
                    if isinstance(one, ast.AST):
                        self._visit(one, statement, function)

    def _replacements(self, node: Any, *, in_function: bool) -> Iterator[tuple[Any, str]]:
        """Yield nodes, `node` or a child of it, and what to put in their place."""
        if isinstance(node, (ast.If, ast.While, ast.IfExp)) and not _is_not(node.test):
            yield node.test, f"(not ({ast.unparse(node.test)}))"
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node, ""
        elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
            value = node.value
            boolean = isinstance(value, (ast.Compare, ast.BoolOp)) or _is_not(value)
            boolean |= isinstance(value, ast.Constant) and isinstance(value.value, bool)
            yield node, f"return not ({ast.unparse(value)})" if boolean else "return None"
        elif in_function and (
            isinstance(node, (ast.Assign, ast.AugAssign))
            or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        ):
            yield node, "pass"
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            for other in COMPARISONS[type(node.ops[0])]:
                yield node, f"({ast.unparse(ast.Compare(node.left, [other()], node.comparators))})"
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
            other = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
            yield node, f"({ast.unparse(ast.BinOp(node.left, other, node.right))})"
        elif isinstance(node, ast.BoolOp):
            other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield node, f"({ast.unparse(ast.BoolOp(other, node.values))})"
        elif _is_not(node):
            yield node, f"({ast.unparse(node.operand)})"
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield node, repr(node.value + 1)

    def _add(self, place: Any, text: str, statement: int, function: tuple[int, int] | None) -> None:
        if place.lineno != place.end_lineno:
            return
        line = self._lines[place.lineno - 1]
        data, start, end = line.encode(), place.col_offset, place.end_col_offset
        if isinstance(place, ast.keyword):
            # A comma goes with it.
            if (comma := re.match(rb"\s*,\s*", data[end:])) is not None:
                end += comma.end()
            elif (comma := re.search(rb",\s*$", data[:start])) is not None:
                start = comma.start()
        after = (data[:start] + text.encode() + data[end:]).decode()
        try:
            ast.parse("\n".join([*self._lines[: place.lineno - 1], after, *self._lines[place.lineno :]]))
        except SyntaxError:
            return
        known = any(line.strip() == old and after.strip() == new for old, new, _ in EQUIVALENT)
        if after != line and not known:
            self.faults.append(Fault(self._file, place.lineno, statement, function, line, after))


def _is_not(node: ast.AST) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _not_executed(node: ast.AST) -> bool:
    if isinstance(node, ast.keyword):
        return node.arg in NO_FAULT_KEYWORDS or ast.unparse(node) == "side='left'"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def find_faults(root: Path, only: list[str]) -> list[Fault]:
    """Return all faults of the library, in order."""
    faults = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        file, source = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        is_kernel = "kernel" in path.stem or re.search(r"^\s*import triton", source, re.MULTILINE)
        if not is_kernel and (not only or any(file.startswith(prefix) for prefix in only)):
            faults += FaultFinder(file, source).faults
    return faults
