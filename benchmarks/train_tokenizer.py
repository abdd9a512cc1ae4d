"""Make the tokenizer in the package: collect free text, balance it, train, measure.

    python benchmarks/train_tokenizer.py OUT_FOLDER SOURCE... --everyday SOURCE...

A source is a folder or file of .jsonl, .html, .page, .txt, .mo, man pages or fortunes; docs/tokenizer.md
lists those used, and the text embedded in Python is always one of them. Sources of everyday Chinese have one
document a line; their last tenth is held out and measured. English, Chinese documentation, classical Chinese
and everyday Chinese have a budget each; within it every source gets an equal share, and what small sources
leave over goes to larger ones.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import struct
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from minimind.data.builtin_corpus import builtin_documents
from minimind.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

HAN = re.compile(r"[\u3400-\u9fff]")
LATIN = re.compile(r"[A-Za-z]")
BLOCKS = frozenset({"title", "h1", "h2", "h3", "h4", "h5", "h6", "p", "div", "section", "pre", "br"})
BLOCKS |= {"item", "li", "dt", "dd", "ul", "ol", "dl", "table", "tr"}
SILENT = frozenset({"script", "style", "nav", "svg"})
MAN_PAGE = re.compile(r"\.[1-9][a-z]*(\.gz)?$")
# A word of a part-of-speech tagged newspaper: the word, a tag, two spaces.
TAG = re.compile(r"/[A-Za-z]+\s*")
# Megabytes of each kind. More Chinese than this takes entries that English needs.
MEGABYTES = {"en": 4.5, "zh": 0.5, "classical": 0.05, "everyday": 1.8}
# Headings and notices that stand on every page of a source would each win an entry of the vocabulary.
MOST_REPEATS = 5


# Two texts about no trade at all, written for this measurement.
EVERYDAY = {
    "everyday en": (
        "A light rain fell this morning and few people were in the streets. My mother made breakfast in the "
        "kitchen while my father read the newspaper by the window. Afterwards we walked to the park, where "
        "many children were flying kites on the grass. To stay healthy, sleep well, eat plenty of vegetables "
        "and fruit, and exercise often. The earth takes a year to go round the sun. The teacher told her "
        "pupils that science needs patience, courage and imagination."
    ),
    "everyday zh": (
        "今天早上下了一场小雨，街道上的行人不多。母亲在厨房里准备早饭，父亲坐在窗边看报纸。"
        "吃过饭以后，我们一起去公园散步，看见许多孩子在草地上放风筝。"
        "中国有悠久的历史和丰富的文化，长江和黄河沿岸有很多古老的城市。"
        "要保持健康，每天要睡好，多吃蔬菜和水果，还要经常锻炼。"
        "地球绕太阳一周需要一年。老师告诉学生，科学研究需要耐心、勇气和想象力。"
    ),
}


class _Prose(HTMLParser):
    """Collects the text of a page: one line for each block, none for scripts and navigation."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._silent += tag in SILENT
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in SILENT and self._silent > 0
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data)


def html_text(page: str) -> str:
    parser = _Prose()
    parser.feed(page)
    # Blank lines between blocks say nothing; those inside <pre> go too, which is no loss here.
    lines = (line.strip() for line in "".join(parser.parts).splitlines())
    return "\n".join(line for line in lines if line)


def man_text(page: str) -> str:
    """Return a man page without its comments, requests and font changes."""
    lines = []
    for line in page.splitlines():
        if line.startswith((r".\"", r"'\"")):
            continue
        line = re.sub(r"^\.(SH|SS|TP|B|I|BR|RB|BI|IR|IB|RI|IP|SM|Nm|Nd|Sh|It|Fl|Ar|Xr)\s+", "", line)
        if line.startswith((".", "'")):
            continue
        line = re.sub(r"\\f(\[[^]]*\]|\(..|.)|\\[&|/^,%]|\\s[-+]?\d", "", line)
        line = re.sub(r"\\\((..)", lambda m: {"em": "-", "aq": "'", "co": "(C)"}.get(m[1], ""), line)
        line = line.replace(r"\-", "-").replace(r"\ ", " ").replace(r"\e", "\\").replace('"', "")
        if line.strip():
            lines.append(line.strip())
    return "\n".join(lines)


def catalogue_texts(catalogue: bytes) -> list[str]:
    """Return the original and the translated messages of a GNU .mo file, as one text each."""
    order = "<" if catalogue[:4] == b"\xde\x12\x04\x95" else ">"
    count, *tables = struct.unpack_from(f"{order}3I", catalogue, 8)
    texts = []
    for table in tables:
        entries = struct.iter_unpack(f"{order}2I", catalogue[table : table + 8 * count])
        messages = [catalogue[offset : offset + length].decode() for length, offset in entries][1:]
        # A context stands before \4 or ^, a plural behind \0.
        plain = (
            re.sub(r"(?s)^.*\x04|^[^\n^]*\^|\x00.*|<[^>]*>", "", message).strip() for message in messages
        )
        texts.append("\n".join(message for message in plain if len(message.encode()) > 30))
    return texts


def documents(source: Path) -> Iterator[str]:
    """Yield the documents of a source; files of unknown formats are skipped."""
    if not source.exists():
        raise SystemExit(f"there is no {source}")
    for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
        if not file.is_file() or file.is_symlink():
            continue
        if file.suffix == ".jsonl":
            yield from (json.loads(line)["text"] for line in file.open(encoding="utf-8"))
        elif file.suffix == ".mo":
            yield from catalogue_texts(file.read_bytes())
        elif file.suffix in (".html", ".page"):
            yield html_text(file.read_text(encoding="utf-8", errors="ignore"))
        elif MAN_PAGE.search(file.name) and "man" in str(file.parent):
            read = gzip.open if file.suffix == ".gz" else open
            with read(file, "rt", encoding="utf-8", errors="ignore") as page:
                yield man_text(page.read())
        elif file.name.endswith((".txt", ".txt.gz")) and "copyright" not in file.name:
            read = gzip.open if file.suffix == ".gz" else open
            with read(file, "rt", encoding="utf-8", errors="ignore") as page:
                yield page.read()
        elif "fortunes" in file.parts and not file.suffix:
            text = re.sub(r"\x1b\[[0-9;]*m", "", file.read_text(encoding="utf-8", errors="ignore"))
            yield from text.split("\n%\n")


def language(text: str) -> str | None:
    """Return en, zh or classical; None where the text is neither English nor Chinese enough."""
    han, latin = len(HAN.findall(text)), len(LATIN.findall(text))
    if han > 0.25 * (han + latin):
        # Modern prose of any length uses this particle, poems hardly ever.
        return "zh" if "的" in text else "classical"
    return "en" if han == 0 and latin > 0.5 * len(text) else None


def water_level(sizes: list[int], budget: int) -> int:
    """Return the cap at which sources of these sizes together fill the budget."""
    remaining = budget
    for done, size in enumerate(sorted(sizes)):
        share = remaining // (len(sizes) - done)
        if size > share:
            return share
        remaining -= size
    return max(sizes, default=0)


def everyday_documents(source: Path) -> list[str]:
    """Return the lines of a text in the order of the file, without part-of-speech tags and duplicates."""
    lines = source.read_text(encoding="utf-8").splitlines()
    if sum(len(TAG.findall(line)) > 2 for line in lines[:100]) > 50:
        lines = [TAG.sub("", line) for line in lines]
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def collect(sources: list[Path]) -> dict[str, dict[str, list[str]]]:
    """Return texts by kind and source; duplicates are dropped."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    seen = set()
    streams = [("embedded", builtin_documents()), *((str(source), documents(source)) for source in sources)]
    for name, stream in streams:
        times: Counter[str] = Counter()
        for text in stream:
            lines = text.split("\n")
            times.update(lines)
            text = "\n".join(line for line in lines if times[line] <= MOST_REPEATS)
            # A page is cut into parts of some paragraphs, so that a large one cannot fill its source's share.
            for part in re.findall(r"(?s).{1,4000}(?:\n|\Z)|.{4000}", text):
                key = hashlib.sha256(part.encode("utf-8", "replace")).digest()
                if len(part) >= 40 and key not in seen and (tag := language(part)):
                    seen.add(key)
                    found[tag][name].append(part)
    return found


def balance(found: dict[str, dict[str, list[str]]]) -> None:
    """Sample from each source in place, so that each kind stays within its budget."""
    for kind, by_source in found.items():
        sizes = [_bytes(texts) for texts in by_source.values()]
        level = water_level(sizes, int(MEGABYTES[kind] * 1e6))
        for name, texts in by_source.items():
            by_source[name] = _sample(texts, level)


def _bytes(texts: list[str]) -> int:
    return sum(len(text.encode("utf-8", "replace")) for text in texts)


def _sample(texts: list[str], limit: int) -> list[str]:
    """Return texts in an order of their hashes, as many as fit."""
    kept = []
    for text in sorted(texts, key=lambda text: hashlib.sha256(text.encode("utf-8", "replace")).digest()):
        limit -= len(text.encode("utf-8", "replace"))
        if limit < 0:
            break
        kept.append(text)
    return kept


def bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    return _bytes(texts) / sum(map(len, tokenizer.encode_batch(texts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write, such as minimind/assets/tokenizer")
    parser.add_argument("sources", type=Path, nargs="*", help="folders and files of text")
    parser.add_argument("--vocab-size", type=int, default=6400)
    parser.add_argument(
        "--everyday", type=Path, nargs="*", default=[], help="everyday Chinese, one document a line"
    )
    parser.add_argument("--compare", type=Path, nargs="*", default=[], help="other tokenizers to measure")
    parser.add_argument("--on", type=Path, nargs="*", default=[], help="sources to measure on")
    args = parser.parse_args()

    start = time.perf_counter()
    found = collect(args.sources)
    held_out = []
    for path in args.everyday:
        lines = everyday_documents(path)
        kept = len(lines) * 9 // 10
        found["everyday"][str(path)] = lines[:kept]
        held_out.append((f"{path.name} (held out)", lines[kept:]))
    balance(found)
    for tag in sorted(found):
        for name, texts in found[tag].items():
            print(f"{tag:<10} {_bytes(texts) / 1e6:7.2f} MB  {name}")
        print(f"{tag:<10} {sum(map(_bytes, found[tag].values())) / 1e6:7.2f} MB  in all")
    texts = [text for tag in sorted(found) for texts in found[tag].values() for text in texts]
    tokenizer = train_tokenizer(texts, args.vocab_size)
    tokenizer.save(args.out)
    print(f"trained in {time.perf_counter() - start:.0f} s; fingerprint {tokenizer.fingerprint}")

    measured = [("embedded", list(builtin_documents()))]
    measured += [(name, [text]) for name, text in EVERYDAY.items()] + held_out
    measured += [(path.name, list(documents(path))) for path in args.on]
    for path in [args.out, *args.compare]:
        other = load_tokenizer(path)
        figures = "  ".join(f"{name} {bytes_per_token(other, texts):.3f}" for name, texts in measured)
        print(f"{path}: {other.vocab_size} entries; bytes per token: {figures}")


if __name__ == "__main__":
    main()
