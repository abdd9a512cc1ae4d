"""`minimind-train info`, `compare` and `reproduce`: what reaches the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.made_runs import make_run

Command = Callable[..., Any]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_info_prints_rows_and_only_commands_that_there_are(run: Command, tmp_path: Path) -> None:
    done = run("info", str(make_run(tmp_path / "my run")))
    assert done.code == 0, done.err
    lines = dict(line.split(":", 1) for line in done.out.splitlines() if line[0] != " ")
    assert {"run", "model", "trained", "loss", "time", "device", "versions", "data", "disk"} <= lines.keys()
    assert "not finished" in lines["run"]
    assert f"minimind-train reproduce '{tmp_path / 'my run'}'" in done.out


def test_info_as_json(run: Command, tmp_path: Path) -> None:
    done = run("info", str(make_run(tmp_path / "a")), "--json")
    values = json.loads(done.out)
    assert (values["steps"], values["tokens"], values["best"]["step"]) == (30, 30_000, 30)
    assert values["next"] == [f"minimind-train reproduce {tmp_path / 'a'}"]


def test_info_names_the_report_and_opens_it(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    folder = make_run(tmp_path / "my run")
    refused = run("info", str(folder), "--open")
    assert (refused.code, opened) == (2, [])
    assert "has no report.html" in refused.err
    page = folder / "report.html"
    page.touch()
    done = run("info", str(folder), "--open")
    assert f"report:      {page}" in done.out
    assert opened == [page.resolve().as_uri()]
    assert json.loads(run("info", str(folder), "--json").out)["report"] == str(page)


def test_info_plots_the_losses_of_a_run(run: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder, picture = str(make_run(tmp_path / "a")), tmp_path / "loss.svg"
    assert run("info", folder, "--plot", str(picture)).code == 0
    drawn = picture.read_text(encoding="utf-8")
    for text in ("training", "validation", "training tokens", "loss (nats per token)"):
        assert f"<!-- {text} -->" in drawn, text
    assert 'width="396pt" height="259.2pt"' in drawn  # 5.5 x 3.6 inches, for a page
    refused = run("info", folder, "--plot", str(tmp_path / "loss.bmp"))
    assert (refused.code, "must end in .png, .pdf or .svg" in refused.err) == (2, True)
    refused = run("info", folder, "--plot", str(tmp_path / "nowhere" / "loss.png"))
    assert (refused.code, "cannot be written (No such file" in refused.err) == (2, True)


def test_plotting_names_the_package_that_is_missing(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused = run("info", str(make_run(tmp_path / "a")), "--plot", str(tmp_path / "loss.png"))
    assert (refused.code, "pip install matplotlib" in refused.err) == (2, True)


def test_info_of_nothing_is_a_mistake_of_the_user(run: Command, tmp_path: Path) -> None:
    done = run("info", str(tmp_path))
    assert done.code == 2
    assert "name one" in done.err


def test_compare_prints_tables_and_takes_names_for_text(run: Command, tmp_path: Path) -> None:
    make_run(tmp_path / "[red]a")
    make_run(tmp_path / "b", learning_rate=1e-3)
    done = run("compare", str(tmp_path / "[red]a"), str(tmp_path / "b"))
    assert done.code == 0, done.err
    assert "[red]a" in done.out
    assert done.out.count("--learning-rate") == 1
    for phrase in ("training loss", "bits/byte at equal tokens", "options that differ"):
        assert phrase in done.out
    assert "code, packages" not in done.out, "nothing of these differs"
    assert "wrote" not in done.out


def test_many_runs_leave_the_names_of_options_whole(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folders = [
        make_run(tmp_path / f"run-{number}", data=(f"texts/of/a/long/path/{number}.jsonl",))
        for number in range(5)
    ]
    make_run(tmp_path / "last", data=("texts/of/a/long/path/last.jsonl",), tie_word_embeddings=False)
    done = run("compare", *map(str, folders), str(tmp_path / "last"))
    assert done.code == 0, done.err
    assert "--tie-word-embeddings " in done.out
    assert "…" not in done.out


def test_compare_writes_a_page(run: Command, tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    done = run("compare", str(tmp_path / "a"), "--html", str(tmp_path / "page.html"))
    assert done.code == 0, done.err
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    refused = run("compare", str(tmp_path / "a"), "--html", str(tmp_path / "missing" / "page.html"))
    assert refused.code == 2
    assert "--html" in refused.err


def test_reproduce_prints_the_command_alone_and_warns_beside_it(run: Command, tmp_path: Path) -> None:
    make_run(tmp_path / "a", environment={"python": "3.1.0"}, data=("nowhere.jsonl",))
    done = run("reproduce", str(tmp_path / "a"))
    assert done.code == 0, done.err
    (line,) = done.out.splitlines()
    assert line.startswith("minimind-train pretrain --data nowhere.jsonl")
    assert line.endswith("a-again")
    assert "warning: Python was 3.1.0" in done.err
    assert "warning: the data cannot be read" in done.err


def test_a_run_named_from_within_is_repeated_beside_it(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_run(tmp_path / "a"))
    assert run("reproduce", ".").out.rstrip().endswith(f"--output-dir={tmp_path / 'a-again'}")
    (tmp_path / "a" / "model").mkdir()
    monkeypatch.chdir(tmp_path / "a" / "model")
    assert run("reproduce", "..").out.rstrip().endswith(f"--output-dir={tmp_path / 'a-again'}")


HOSTILE = "cpu\x1b]0;PWNED\x07\x1b[2J\rFAKE LINE\x9b31m\u202egnp.exe"


def test_what_a_run_recorded_reaches_the_terminal_escaped(run: Command, tmp_path: Path) -> None:
    folder = str(
        make_run(tmp_path / "a", environment={"device": HOSTILE, "python": HOSTILE}, data=(HOSTILE,))
    )
    make_run(tmp_path / "b")
    for args in (["info", folder], ["compare", folder, str(tmp_path / "b")], ["reproduce", folder]):
        done = run(*args)
        assert done.code == 0, done.err
        shown = done.out + done.err
        assert "x1b]0;PWNED" in shown
        assert not set(shown) & set("\x1b\x07\r\x9b\u202e"), args
    broken = tmp_path / "broken"
    broken.mkdir()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    values = {"model_type": "qwen3", "vocab_size": HOSTILE, "intermediate_size": 8, **sizes}
    (broken / "config.json").write_text(json.dumps(values))
    refused = run("info", str(broken))
    assert refused.code == 2
    assert "x1b" in refused.err
    assert "\x1b" not in refused.err
