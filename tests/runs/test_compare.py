"""Runs side by side: equal tokens, differences, and the page, opened in a browser where there is one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minimind.errors import ConfigError
from minimind.runs.compare import Comparison, at_tokens, compare_runs, distinct_names
from minimind.runs.compare_html import CHARTS, comparison_html
from minimind.tracking.curves import MOST_POINTS, Point, RunClock, curve, thinned
from support.html_pages import CHROMIUM, Parsed, assert_self_contained, contrast, open_in_chromium
from support.made_runs import make_run

# A folder's name may be anything but a slash; so may be what a run recorded.
HOSTILE = "<img src=x onerror=alert(1)> & \"q' [bold]x"
HOSTILE_TEXT = "</script><script>document.title='taken'</script><img src=//evil.example/x>"


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    make_run(tmp_path / "a", learning_rate=5e-4)
    make_run(
        tmp_path / HOSTILE,
        [3.8, 2.9, 2.2],
        {0: 2.0, 20: 1.2, 30: 0.9},
        seconds_a_step=3.0,
        tokens_a_step=2000,
        environment={
            "packages": {"minimind": "0.1.0", "torch": "2.12.0", HOSTILE_TEXT: HOSTILE_TEXT},
            "git": {"commit": "b" * 40, "changed": True},
        },
        learning_rate=1e-3,
        data=(HOSTILE_TEXT,),
        run_name=HOSTILE_TEXT,
    )
    return compare_runs([tmp_path / "a", tmp_path / HOSTILE])


def rows(table: Any) -> dict[str, tuple[str, ...]]:
    return {row.name: row.values for row in table}


def test_only_what_differs_is_listed(comparison: Comparison) -> None:
    options = rows(comparison.options)
    assert set(options) == {"--learning-rate", "--data"}
    assert options["--learning-rate"] == ("0.0005", "0.001")
    environment = rows(comparison.environment)
    assert set(environment) == {"torch", "git commit", HOSTILE_TEXT}
    assert environment["torch"] == ("2.13.0", "2.12.0")
    assert environment["git commit"] == ("aaaaaaaaaaaa", "bbbbbbbbbbbb with changes")
    assert environment[HOSTILE_TEXT][0] == "–"


def test_bits_per_byte_are_compared_at_the_same_tokens(tmp_path: Path) -> None:
    # Evaluations of the first run after 10k, 20k and 30k tokens; of the second after 18k, 22k and 60k.
    make_run(tmp_path / "a", bits={0: 2.0, 10: 1.5, 20: 1.2, 30: 1.0})
    make_run(tmp_path / "b", [3.0] * 30, {0: 2.0, 90: 1.4, 110: 1.0, 300: 0.9}, tokens_a_step=200)
    table = rows(compare_runs([tmp_path / "a", tmp_path / "b"]).equal_tokens)
    assert table == {"10.0k": ("1.5000", "–"), "20.0k": ("1.2000", "1.2000"), "30.0k": ("1.0000", "–")}


def test_nothing_is_interpolated_from_step_0(comparison: Comparison) -> None:
    # Evaluations after 10k and 30k tokens, and after 40k and 60k.
    assert rows(comparison.equal_tokens) == {"10.0k": ("1.5000", "–"), "30.0k": ("1.0000", "–")}


def test_values_are_interpolated_between_near_evaluations_only() -> None:
    curve = [Point(0, 0.0, None, 9.0), Point(1, 16.0, None, 5.0), Point(2, 20.0, None, 3.0)]
    assert at_tokens(curve, 18) == 4.0
    assert (at_tokens(curve, 0), at_tokens(curve, 16), at_tokens(curve, 20)) == (9.0, 5.0, 3.0)
    assert (at_tokens(curve, 9), at_tokens(curve, 21)) == (None, None)
    assert at_tokens([Point(1, 15.0, None, 5.0), Point(2, 20.0, None, 3.0)], 18) is None


@pytest.mark.parametrize(
    ("options", "fingerprints", "ranked"),
    [
        ({}, {}, True),
        ({}, {"training text": "x" * 32}, False),
        ({"data": ("a.jsonl",), "val_data": ("held_out.jsonl",)}, {"training text": "x" * 32}, True),
        # The fingerprint is of the tokens.
        ({}, {"training text": "x" * 32, "tokenizer": "y" * 64}, True),
        ({"data": ("other.jsonl",)}, {"training text": "x" * 32, "tokenizer": "y" * 64}, False),
    ],
)
def test_runs_with_other_validation_data_are_not_ranked(
    tmp_path: Path, options: dict[str, Any], fingerprints: dict[str, str], ranked: bool
) -> None:
    make_run(tmp_path / "a", **(options if "val_data" in options else {}))
    known = {"training text": "d" * 32, "tokenizer": "e" * 64, "mixture": "none"}
    make_run(tmp_path / "b", environment={"fingerprints": known | fingerprints}, **options)
    found = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert bool(found.equal_tokens) == ranked
    assert any("validated on different data" in note for note in found.notes) != ranked


def test_evaluations_are_marked_by_points(comparison: Comparison) -> None:
    page = comparison_html(comparison)
    charts = json.loads(Parsed(page).scripts[0])["charts"]
    marked = [chart["name"] for chart in charts if any(curve["marks"] for curve in chart["curves"])]
    assert marked == ["val_bits_per_byte"]
    assert "if (marks)" in page


def test_runs_without_evaluations_have_no_table_of_them(tmp_path: Path) -> None:
    make_run(tmp_path / "a", bits={})
    make_run(tmp_path / "b")
    found = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert found.equal_tokens == ()
    assert rows(found.outcome)["best bits/byte"] == ("–", "1.0000")
    assert "Not all runs have evaluations on the same data" in comparison_html(found)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"training text": "x" * 32}, "trained on different data"),
        ({"tokenizer": "x" * 64}, "different tokenizers"),
        (None, ""),
    ],
)
def test_what_forbids_a_comparison_is_said(tmp_path: Path, changes: Any, note: str) -> None:
    make_run(tmp_path / "a")
    fingerprints = {"training text": "d" * 32, "tokenizer": "e" * 64, "mixture": "none", **(changes or {})}
    make_run(tmp_path / "b", environment={"fingerprints": fingerprints})
    found = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert bool(found.notes) == bool(note)
    assert note in " ".join(found.notes)


def test_what_was_not_recorded_is_not_called_another(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", environment={"fingerprints": None})
    (note,) = compare_runs([tmp_path / "a", tmp_path / "b"]).notes
    assert note.startswith("Not all runs recorded their data")


def test_names_are_as_long_as_they_must_be() -> None:
    paths = [Path("/runs/x/out"), Path("/runs/y/out"), Path("/other"), Path("/other"), Path("/out")]
    assert distinct_names(paths) == ("x/out", "y/out", "other", "other (2)", "/out")


def test_a_long_curve_is_thinned_by_means_and_ranges_and_keeps_its_ends() -> None:
    steps = [float(step) for step in range(10_001)]
    values = [step + 5000 * (step == 7777) for step in steps]
    points, fewer = curve(steps, values, RunClock()), thinned(steps, values, RunClock())
    assert len(fewer) == MOST_POINTS
    assert (fewer[0], fewer[-1]) == (points[0], points[-1])
    inner = fewer[1:-1]
    assert all(abs(point.value - point.step) <= 0.5 for point in inner if point.high < 10_001)
    assert all(0 < point.step - point.low < 12 for point in inner)
    assert max(point.high for point in inner) == 12_777, "no spike is lost"
    assert thinned(steps[:5], values[:5], RunClock()) == points[:5]


def test_nothing_of_the_runs_becomes_markup(comparison: Comparison) -> None:
    page = comparison_html(comparison)
    parsed = Parsed(page)
    assert parsed.all("img") == []
    assert len(parsed.all("script")) == 2
    assert "<" not in parsed.scripts[0], "nothing may end the element or begin a comment"
    data = json.loads(parsed.scripts[0])
    assert [curve["label"] for curve in data["charts"][0]["curves"]] == ["a", HOSTILE]
    assert "onerror=alert(1)&gt;" in page


def test_the_page_asks_for_nothing_from_anywhere(comparison: Comparison) -> None:
    assert_self_contained(comparison_html(comparison))


def test_tables_and_controls_have_names(comparison: Comparison) -> None:
    parsed = Parsed(comparison_html(comparison))
    tables, captions = parsed.all("table"), parsed.all("caption")
    assert len(tables) == len(captions) == 4
    assert {heading["scope"] for heading in parsed.all("th")} == {"col", "row"}
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in parsed.elements:
        assert (attributes.get("aria-labelledby") or ids[0]) in ids
    scrolled = [a for a in parsed.all("div") if a.get("class") == "scroll"]
    assert all(a["tabindex"] == "0" and a["role"] == "region" for a in scrolled)
    assert parsed.all("html")[0]["lang"] == "en"
    assert next(tag for tag, _ in parsed.elements if tag in ("h1", "h2", "h3")) == "h1"


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_from_the_ground(comparison: Comparison, scheme: int) -> None:
    blocks = re.findall(r":root \{(.*?)\}", comparison_html(comparison), flags=re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[scheme]))
    for ground in ("ground", "panel"):
        for text in ("ink", "faint", "accent"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for number in range(8):
            assert contrast(colours[f"c{number}"], colours[ground]) >= 3, (number, ground)
    assert contrast(colours["ink"], colours["note"]) >= 4.5


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_draws_every_curve(comparison: Comparison, tmp_path: Path) -> None:
    folder = tmp_path / "browser"
    folder.mkdir()
    page = comparison_html(comparison)
    (folder / "page.html").write_text(page, encoding="utf-8")
    dom = open_in_chromium(folder / "page.html", "--dump-dom")
    charts = re.findall(r"<figure id=\"chart-(\w+)\">(.*?)</figure>", dom, flags=re.DOTALL)
    assert [name for name, _ in charts] == [chart.name for chart in CHARTS]
    for name, figure in charts:
        drawn = re.findall(r'<path class="line c(\d) d\d" d="(M[^"]+)"', figure)
        assert [number for number, _ in drawn] == ["0", "1"], name
        assert all(path.count("L") == 2 and "NaN" not in path for _, path in drawn), (name, drawn)
        assert 'role="img"' in figure
        assert "ends at" in figure
    assert "by optimizer steps: a ends at 2.5000" in dom
    assert "<title>a, &lt;img" in dom
    assert "alert(1)&gt; &amp;" in dom

    # What a visitor chooses is read from the form, here as if it had been sent so.
    by_time = page.replace('value="0" checked> Steps', 'value="0"> Steps').replace(
        'value="2"> Training', 'value="2" checked> Training'
    )
    (folder / "page.html").write_text(by_time.replace('name="run" value="1" checked', 'name="run" value="1"'))
    picture = folder / "page.png"
    dom = open_in_chromium(folder / "page.html", "--dump-dom", f"--screenshot={picture}")
    assert "Training loss by training time: a ends at 2.5000. Arrow" in dom
    assert len(re.findall(r'<path class="line', dom)) == len(CHARTS)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_run_makes_a_page_too(tmp_path: Path) -> None:
    page = comparison_html(compare_runs([make_run(tmp_path / "only")]))
    assert "<h1>One run</h1>" in page
    assert "All runs have the same options" in page


def test_a_run_without_numbers_makes_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").touch()
    found = compare_runs([tmp_path / "new", make_run(tmp_path / "a")])
    Parsed(comparison_html(found))
    assert rows(found.outcome)["training loss"] == ("–", "2.5000")


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        compare_runs([make_run(tmp_path / "a"), tmp_path / "nowhere"])
