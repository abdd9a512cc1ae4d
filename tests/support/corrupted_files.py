"""Damages every file of a checkpoint, a token cache, a model folder and a run, and reads each as commands do.

    PYTHONPATH=tests python tests/support/corrupted_files.py FOLDER OFFSETS

prints a table. A damage is found if a reader says so and names the file, silent if readers accept it, and a
traceback if a reader raises anything else than a UserError.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minimind import pretrain
from minimind.checkpoint.files import best_checkpoint, latest_checkpoint, open_checkpoint
from minimind.config.options import PretrainConfig
from minimind.data.prepare import prepare_data
from minimind.errors import UserError
from minimind.formats.open_model import load_with_tokenizer
from minimind.runs.compare import compare_runs
from minimind.runs.info import read_info
from minimind.tokenizer import load_tokenizer
from support.tiny_runs import tiny, write_corpus

ZEROS = 64
# Edited by hand, or written line by line: a changed digit in them looks like any other value.
UNPROTECTED = ("config.toml", "metrics.jsonl", "environment.json", "best.json")


def damages(whole: bytes, offsets: int) -> Iterator[tuple[int, bytes]]:
    """Yield flipped bits, cuts and zeros at evenly spaced offsets."""
    for number in range(offsets):
        offset = number * (len(whole) - 1) // max(offsets - 1, 1)
        flipped = bytes([whole[offset] ^ (1 << number % 8)])
        zeros = bytes(len(whole[offset : offset + ZEROS]))
        for data in (
            whole[:offset] + flipped + whole[offset + 1 :],
            whole[:offset],
            whole[:offset] + zeros + whole[offset + ZEROS :],
        ):
            if data != whole:
                yield offset, data


def make_run(folder: Path) -> PretrainConfig:
    config = tiny(write_corpus(folder / "corpus.jsonl"), folder / "run", max_steps=6, save_interval=3)
    pretrain(config)
    return config


def read_checkpoint(config: PretrainConfig, file: Path) -> None:
    """Resuming must skip the damaged checkpoint, and naming it must be refused."""
    skipped: list[str] = []
    latest = latest_checkpoint(file.parent.parent, skipped.append)
    if latest is None or latest.path != file.parent:
        assert latest is not None
        assert file.name in skipped[0]
        open_checkpoint(file.parent)


def read_cache(config: PretrainConfig, file: Path) -> None:
    """A damaged cache is built again, with a warning that names the file."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        prepare_data(config, load_tokenizer())
    if said:
        raise UserError(str(said[0].message))


def read_model(config: PretrainConfig, file: Path) -> None:
    """`generate`, `eval` and `--from-weight` read what they need, `info` checks all files."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if file.name != "special_tokens_map.json":
            load_with_tokenizer(file.parent)
        else:
            read_info(file.parent)
    if said:
        raise UserError(str(said[0].message))


def read_run_files(config: PretrainConfig, file: Path) -> None:
    run = Path(config.output_dir)
    best_checkpoint(run / "checkpoints")
    read_info(run)
    compare_runs([run, run])


def sweep(
    config: PretrainConfig, files: list[Path], read: Callable[[PretrainConfig, Path], None], offsets: int
) -> Counter[tuple[str, str]]:
    """Return how often a damage of each file was found, silent or a traceback."""
    count: Counter[tuple[str, str]] = Counter()
    for file in files:
        whole = file.read_bytes()
        for offset, data in damages(whole, offsets):
            file.write_bytes(data)
            try:
                read(config, file)
                outcome = "silent"
            except UserError as error:
                outcome = "found" if file.name in str(error) else f"found, but not named: {error}"
            except Exception as error:
                outcome = f"traceback at {offset}: {error!r}"
            count[file.name, outcome] += 1
            if read is read_cache:
                for part in file.parent.iterdir():  # built again
                    assert part.stat().st_size
            file.write_bytes(whole)
    return count


def sweep_all(folder: Path, offsets: int) -> dict[str, Counter[tuple[str, str]]]:
    config = make_run(folder)
    run = Path(config.output_dir)
    (cache,) = (path for path in Path(str(config.cache_dir)).iterdir() if path.is_dir())
    parts: dict[str, tuple[Path, Callable[..., Any]]] = {
        "checkpoint": (run / "checkpoints" / "step-00000006", read_checkpoint),
        "token cache": (cache, read_cache),
        "model folder": (run / "model", read_model),
    }
    found = {
        # The model card is text for people, who edit it.
        name: sweep(
            config,
            sorted(path for path in place.iterdir() if path.is_file() and path.name != "README.md"),
            read,
            offsets,
        )
        for name, (place, read) in parts.items()
    }
    loose = [run / name if name != "best.json" else run / "checkpoints" / name for name in UNPROTECTED]
    found["run folder"] = sweep(config, [file for file in loose if file.exists()], read_run_files, offsets)
    return found


def main(folder: Path, offsets: int) -> None:
    print("| files | damages | found and named | silent | others |\n| --- | --- | --- | --- | --- |")
    for name, count in sweep_all(folder, offsets).items():
        for file in sorted({file for file, _ in count}):
            of_file = Counter({outcome: times for (other, outcome), times in count.items() if other == file})
            rest = {
                outcome: times for outcome, times in of_file.items() if outcome not in ("found", "silent")
            }
            counts = (of_file.total(), of_file["found"], of_file["silent"], rest or 0)
            print(f"| {name}: {file} | {' | '.join(map(str, counts))} |")


if __name__ == "__main__":
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    Path(sys.argv[1]).mkdir(parents=True)
    main(Path(sys.argv[1]), int(sys.argv[2]))
