"""README and docs: commands that parse, code that imports, links that lead somewhere, languages in step."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.main import get_command

from minimind.config.options import PretrainConfig
from minimind.config.presets import preset_config
from minimind.config.schema import parse_values
from minimind.formatting import size
from minimind.modeling.config import MiniMindConfig
from minimind.planning.memory import optimizer_bytes
from minimind.runs.info import SHAPE
from minimind_cli.app import app
from minimind_cli.config_options import DEFAULT_BUDGETS
from minimind_cli.options import LENIENT, normalize, typed_values, unknown_args

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("README*.md"), ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
# An English page and its translation.
PAIRS = [
    ("README.md", "README_zh.md"),
    ("docs/quickstart.md", "docs/quickstart_zh.md"),
    ("docs/fine-tuning.md", "docs/fine-tuning_zh.md"),
    ("docs/migration.md", "docs/migration_zh.md"),
    ("docs/budget.md", "docs/budget_zh.md"),
    ("docs/continuing.md", "docs/continuing_zh.md"),
]
PROGRAM = re.compile(r"minimind-train|minimind_cli")


@dataclass(frozen=True)
class Block:
    """A fenced block: what stands behind its fence, and its text."""

    language: str
    text: str


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", read(page), re.M | re.S)]


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S)


def count(page: str, pattern: str) -> int:
    return len(re.findall(pattern, prose(page), re.M))


def inline_code(page: str) -> list[str]:
    return re.findall(r"`([^`]+)`", prose(page))


def commands(text: str) -> list[list[str]]:
    """Return the arguments after the program's name in each command of a shell text."""
    found: list[list[str]] = []
    text = text.replace("\\\n", " ").replace("$(which minimind-train)", "minimind-train")
    for line in filter(PROGRAM.search, text.splitlines()):
        # Words in brackets stand for options.
        lexer = shlex.shlex(re.sub(r"\[[^]]*\]", "", line), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        args: list[str] | None = None
        for word in lexer:
            if PROGRAM.search(word) and " " in word:
                found += commands(word)  # a command line in quotes, for another shell
            elif args is None and PROGRAM.fullmatch(word):
                args = []
                found.append(args)
            elif set(word) <= set(";&|()<>"):
                args = None
            elif args is not None and word not in ("...", "…"):
                args.append(word)
    return [args for args in found if args]


def commands_of(page: str) -> list[list[str]]:
    shown = [block.text for block in blocks(page) if block.language in ("", "bash", "sh")]
    return [command for text in (*shown, *inline_code(page)) for command in commands(text)]


ALL_COMMANDS = sorted({(page, shlex.join(args)) for page in NAMES for args in commands_of(page)})


def parse(args: list[str]) -> list[str]:
    """Return what the program would say against a command line; nothing is run."""
    args = normalize(args)
    command = get_command(app)
    while hasattr(command, "commands") and not args[0].startswith("-"):
        if args[0] not in command.commands:
            return [f"no command {args[0]}"]
        command = command.commands[args.pop(0)]
    if hasattr(command, "commands"):
        # Options of the program itself end it.
        known = {"--help", *(flag for param in command.params for flag in param.opts)}
        return [] if args[0] in known else [f"no option {args[0]}"]
    if {"--help", "--help-all"} & set(args):
        return []
    try:
        context = command.make_context(command.name, list(args))
    except Exception as error:
        return [str(error)]
    if command.context_settings != LENIENT:
        return []
    _, problems = parse_values(PretrainConfig, typed_values(context))
    return [*unknown_args(context), *problems]


@pytest.mark.parametrize(("page", "line"), ALL_COMMANDS)
def test_a_command_in_the_docs_parses(page: str, line: str) -> None:
    args = shlex.split(line)
    assert parse(args) == []


def test_commands_are_found_in_every_form() -> None:
    text = (
        "minimind-train tokenize --data 'a b.txt' && minimind-train pretrain  # comment\n"
        "WANDB_MODE=offline minimind-train pretrain --tracker wandb ...\n"
        "accelerate launch --num_processes 8 -m minimind_cli pretrain \\\n  --preset 1b\n"
        "srun bash -c 'torchrun --nnodes 2 -m minimind_cli bench' &\n"
        "torchrun $(which minimind-train) verify-resume --steps 20 [the options of pretrain]\n"
    )
    assert commands(text) == [
        ["tokenize", "--data", "a b.txt"],
        ["pretrain"],
        ["pretrain", "--tracker", "wandb"],
        ["pretrain", "--preset", "1b"],
        ["bench"],
        ["verify-resume", "--steps", "20"],
    ]
    assert len(ALL_COMMANDS) > 25


@pytest.mark.parametrize(
    "line",
    [
        "pretrian",
        "pretrain --learnin-rate 1",
        "pretrain --batch-size many",
        "pretrain corpus.jsonl",
        "tokenizer trian",
        "tokenizer inspect --colour",
        "checkpoints",
        "bench --from-resume 1",
    ],
)
def test_a_wrong_command_would_be_noticed(line: str) -> None:
    assert parse(line.split()) != []


@pytest.mark.parametrize("page", NAMES)
def test_python_in_the_docs_imports_what_exists(page: str) -> None:
    for block in blocks(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minimind":
                module = importlib.import_module(node.module or "")
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


def anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", NAMES)
def test_a_link_leads_somewhere(page: str) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(str(path.relative_to(ROOT)))):
            missing.append(target)
    assert missing == []


def test_pages_show_the_preset_tiny_as_it_is() -> None:
    """Its numbers are from real runs, which have to be made again when its options change."""
    config = preset_config("tiny")
    shape = MiniMindConfig(**{name: getattr(config, name) for name in SHAPE if name != "vocab_size"})
    plan = read("docs/planning.md")
    assert re.search(rf"^run: +\d+ steps, .*, {config.epochs} epochs,", plan, re.M)
    assert f"optimizer {size(optimizer_bytes(shape, config.optimizer))}, activations" in plan


@pytest.mark.parametrize("page", ["docs/quickstart.md", "docs/quickstart_zh.md"])
def test_pages_name_the_budgets_of_the_default_run(page: str) -> None:
    assert f"`--budget {DEFAULT_BUDGETS['GPU']}`" in read(page)
    assert f'`--budget "{DEFAULT_BUDGETS["CPU"]}"`' in read(page)


def linked_pages(page: str) -> list[str]:
    """Return the pages in the rows of README's table, in order, a translation as its original."""
    rows = re.findall(r"^\| \[[^]]*\]\((docs/[^)]+\.md)\) \|", read(page), re.M)
    originals = {translation: original for original, translation in PAIRS}
    return [originals.get(row, row) for row in rows]


def test_readme_names_every_page() -> None:
    translations = {translation for _, translation in PAIRS}
    assert set(linked_pages("README.md")) == {
        name
        for name in NAMES
        if name.startswith("docs/")
        and name not in translations
        # A folder of pages is linked by its index.
        and (name.count("/") == 1 or name.endswith("/index.md"))
    }
    assert linked_pages("README_zh.md") == linked_pages("README.md")


def test_the_tree_in_readme_names_what_exists() -> None:
    (tree,) = [block.text for block in blocks("README.md") if block.text.startswith("minimind/\n")]
    missing = []
    for line in tree.splitlines():
        folder = ROOT / "minimind" if line.startswith(" ") else ROOT
        names = re.split(r" {2,}", line.strip())[0].split()
        missing += [name for name in names if not any(folder.glob(name))]
    assert missing == []


def without_comments(block: Block) -> list[str]:
    """Return a block's lines without comments; of what is no language, the names of files and the numbers."""
    if not block.language:
        return re.findall(r"[\w.]*\w[./]\w*", block.text)
    # A prompt is in the language of its page.
    lines = [re.sub(r'(generate \S+) "[^"]*"', r"\1", line) for line in block.text.splitlines()]
    return [line for line in (re.sub(r"\s*#.*", "", line) for line in lines) if line]


@pytest.mark.parametrize(("page", "translation"), PAIRS)
def test_a_translation_is_in_step(page: str, translation: str) -> None:
    ours, theirs = blocks(page), blocks(translation)
    assert [block.language for block in theirs] == [block.language for block in ours]
    for one, other in zip(ours, theirs, strict=True):
        assert without_comments(other) == without_comments(one)
    # Options, files and names in the text; the two languages put them in another order.
    assert sorted(set(inline_code(translation))) == sorted(set(inline_code(page)))
    for heading_row_or_item in (r"^#+ ", r"^\|", r"^- "):
        assert count(translation, heading_row_or_item) == count(page, heading_row_or_item)


@pytest.mark.parametrize(("page", "translation"), PAIRS)
def test_a_page_and_its_translation_link_to_each_other(page: str, translation: str) -> None:
    assert f"]({Path(translation).name})" in read(page)
    assert f"]({Path(page).name})" in read(translation)
