"""Build the packaged cloze sets, `minimind/assets/cloze`: python benchmarks/build_cloze.py

Sources: the prose of this project's documentation, the everyday sentences in `benchmarks/cloze`, written for
this purpose, and Chinese idioms. None of it is in the corpus that is built into Python. In each sentence one
word is replaced by three others of similar frequency in the same sources.
The same sources and seed give the same items; a change of the items needs another `version`.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "benchmarks" / "cloze"
TARGET = ROOT / "minimind" / "assets" / "cloze"
VERSION, SEED, NUM_CHOICES = 1, 20261128, 4
LONG = 80  # characters of a sentence of the documentation that makes two items
HAN = r"\u4e00-\u9fff"


def prose(pages: Iterable[Path]) -> Iterator[str]:
    """Yield the paragraphs of Markdown pages without code, tables, headings and markup."""
    for page in pages:
        text = re.sub(r"```.*?```|<!--.*?-->|^---\n.*?\n---$", "", page.read_text("utf-8"), flags=re.S | re.M)
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
        for block in re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", text):
            if not re.match(r"\s*[#|<:]|    ", block):
                yield " ".join(block.replace("**", "").split())


def english(pages: list[Path], draw: random.Random) -> list[list[object]]:
    """Return items (before, choices, after) of one word each; the first choice is right."""
    found = [s for text in prose(pages) for s in re.split(r"(?<=[.!?]) ", text)]
    plain = [s for s in dict.fromkeys(found) if re.fullmatch(r"[A-Z][a-zA-Z ,;'-]{39,159}[.]", s)]
    everyday = lines("everyday_en.txt")
    words = Counter(word for s in [*plain, *everyday] for word in re.findall(r"\b[a-z]{2,}\b", s))
    items = []
    for sentence in [*plain, *everyday]:
        places = [m.span() for m in re.finditer(r"(?<= )[a-z]{2,}\b(?!')", sentence) if m.start() >= 15]
        number = 1 if sentence in plain and len(sentence) < LONG else 2
        items += [item(sentence, *place, words, draw) for place in spread(places, number, draw)]
    return items


def chinese(pages: list[Path], draw: random.Random) -> list[list[object]]:
    """Return items as `english`, of one word of two characters each, or of the second half of an idiom.

    Single characters would not do: a tokenizer knows the words of a sentence, so that the sentence with
    another character has more tokens, and a model without any training prefers the original.
    """
    found = [s.strip() for text in prose(pages) for s in re.split(r"(?<=[。！？])", text)]
    pool = [s for s in dict.fromkeys(found) if len(re.findall(rf"[{HAN}]", s)) >= 12]
    pool += lines("everyday_zh.txt")
    known = sorted(" ".join(lines("words_zh.txt")).split())
    pattern = re.compile("|".join(known))
    words = Counter(word for sentence in pool for word in pattern.findall(sentence))
    items = []
    for sentence in pool:
        places = [match.span() for match in pattern.finditer(sentence) if match.start() >= 2]
        items += [item(sentence, *place, words, draw) for place in spread(places, 3, draw)]
    idioms = " ".join(lines("idioms_zh.txt")).split()
    halves = Counter(idiom[2:] for idiom in idioms)
    return items + [item(idiom, 2, 4, halves, draw) for idiom in idioms]


def spread(places: list[tuple[int, int]], number: int, draw: random.Random) -> list[tuple[int, int]]:
    """Return one random place of each of `number` parts of a sentence."""
    bounds = [len(places) * part // number for part in range(number + 1)]
    return [draw.choice(places[a:b]) for a, b in pairwise(bounds) if a < b]


def item(
    sentence: str, start: int, stop: int, frequencies: Counter[str], draw: random.Random
) -> list[object]:
    """Return one item, whose wrong choices have a similar frequency."""
    right = sentence[start:stop]
    near = sorted(
        (word for word in frequencies if word != right),
        key=lambda word: (abs(math.log2(frequencies[word] / frequencies[right])), word),
    )
    closest = max(40, sum(frequencies[word] == frequencies[right] for word in near))
    return [sentence[:start], [right, *draw.sample(near[:closest], NUM_CHOICES - 1)], sentence[stop:]]


def lines(name: str) -> list[str]:
    """Return the lines of a source."""
    return (SOURCES / name).read_text("utf-8").splitlines()


def main() -> None:
    """Write both sets."""
    pages = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
    in_chinese = [page for page in pages if page.stem.endswith("_zh")]
    in_english = [page for page in pages if page not in in_chinese and page.name != "configuration.md"]
    TARGET.mkdir(exist_ok=True)
    for name, build, sources in (("en", english, in_english), ("zh", chinese, in_chinese)):
        items = build(sources, random.Random(SEED))
        lines_of_items = ",\n".join(json.dumps(item, ensure_ascii=False) for item in items)
        (TARGET / f"{name}.json").write_text(
            f'{{"version": {VERSION}, "items": [\n{lines_of_items}\n]}}\n', encoding="utf-8"
        )
        print(name, len(items), (TARGET / f"{name}.json").stat().st_size)


if __name__ == "__main__":
    main()
