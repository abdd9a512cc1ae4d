"""report.html: what stands in it, that nothing of a run becomes markup, and that it follows a running run."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import time
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minimind.config.options import PretrainConfig
from minimind.io import atomic
from minimind.run_folder import RunFolder
from minimind.tracking import live_report
from minimind.tracking.live_report import LiveReport
from minimind.tracking.report_page import CHARTS, DRAWN, LOSS, SCORES, RunFacts, RunState, report_html
from minimind.training.summary import run_facts
from support.html_pages import CHROMIUM, Parsed, assert_self_contained, open_in_chromium

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)> & \" ' \udc80"
FACTS = RunFacts(
    name="first-try",
    total_steps=40,
    rows=[("model", "1.61M parameters"), ("device", "CPU x 1, float32, not compiled")],
    data=["training    10 documents, 100 tokens", "duplicates  3 training documents repeat an earlier one"],
    options={"Model": [("--hidden-size", "64", False)], "Run": [("--seed", "42", True)]},
    environment={
        "command": ["minimind-train", "pretrain", "--run-name", "a b"],
        "git": None,
        "packages": {"torch": "2.13.0"},
        "launch": {"compiled": False, "variables": {}},
    },
)


def line(step: int, **values: Any) -> str:
    time = f"2026-01-02T03:04:{step:02d}.000+00:00"
    return json.dumps({"step": step, "time": time, "kind": "train", **values}) + "\n"


def training(step: int, loss: float) -> str:
    rest = {"learning_rate": 1e-3, "grad_norm": 0.5, "tokens": 100 * step, "elapsed": 2.0 * step}
    return line(step, loss=loss, **rest, tokens_per_second=50.0)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text(
        line(0, val_loss=8.0, val_bits_per_byte=4.0)
        + "".join(training(step, 8.0 - step / 10) for step in (10, 20, 30))
        + line(30, val_loss=5.5, val_bits_per_byte=2.75)
        + '{"step": 40, "lo'
    )
    return folder


def charts(page: str) -> dict[str, dict[str, Any]]:
    return {chart["name"]: chart for chart in json.loads(Parsed(page).scripts[0])["charts"]}


def read(page: str) -> str:
    """Return the text of a page outside of its scripts and style."""
    body = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_the_page_shows_what_the_run_has_written(folder: RunFolder) -> None:
    folder.samples.write_text(line(20, prompt="Once", text=" upon a time"))
    folder.spikes.mkdir()
    spike = {"step": 20, "loss": None, "limit": 4.5, "update_skipped": True, "documents": [
        {"loss": loss, "tokens": 7, "text": f"text with loss {loss}"} for loss in (2.0, 1.0, None, 9.0)
    ]}  # fmt: skip
    (folder.spikes / "step-00000020.json").write_text(json.dumps(spike))
    (folder.spikes / "step-00000030.json").write_text("torn")
    report = LiveReport(
        folder, FACTS, warnings=["look at step 20"], totals=lambda: {"training": 9.0, "saving": 1.0}
    )
    assert report.finish("The model is saved.") == folder.report
    page = folder.report.read_text(encoding="utf-8")
    shown = read(page)
    for text in (
        *("first-try", "Finished", "Step 30 of 40 (75%). The model is saved."),
        *("Training loss 5.0000", "Validation loss 5.5000", "Training time 1m00s", "look at step 20"),
        *("Training steps 9s 90.0%", "Saving 1s 10.0%", "Step 20 Once upon a time"),
        *("Step 20: loss not finite, limit 4.5, update skipped", "Loss 9, 7 tokens text with loss 9.0"),
        *("--hidden-size 64", "--seed 42", "duplicates 3 training documents repeat an earlier one"),
        *(
            "minimind-train pretrain --run-name &#x27;a b&#x27;",
            "torch 2.13.0",
            "compiled no, variables none",
        ),
    ):
        assert text in shown, text
    assert "text with loss 1.0" not in shown, "the worst documents only"
    assert "git" not in shown, "nothing that was not recorded"
    (differing,) = re.findall(r"Options that differ from the defaults(.*?)</table>", page, re.DOTALL)
    assert "--seed" not in differing
    drawn = charts(page)
    assert list(drawn) == ["loss", "val_bits_per_byte", "learning_rate", "grad_norm", "tokens_per_second"]
    losses, evaluations = drawn["loss"]["curves"]
    assert losses["points"] == [[10, 1000, 20, 7], [20, 2000, 40, 6], [30, 3000, 60, 5]]
    assert (evaluations["label"], evaluations["marks"]) == ("validation", True)
    assert evaluations["points"] == [[0, 0, 0, 8], [30, 3000, 60, 5.5]]
    assert json.loads(Parsed(page).scripts[0])["reload"] == 0
    assert_self_contained(page)


def test_a_forecast_is_drawn_with_its_range(folder: RunFolder) -> None:
    text = folder.metrics.read_text().removesuffix('{"step": 40, "lo')
    forecast = {"val_forecast_bits_per_byte": 2.5, "val_forecast_low": 2.25, "val_forecast_high": 3.0}
    folder.metrics.write_text(text + line(30, val_bits_per_byte=2.75, **forecast))
    LiveReport(folder, FACTS)._write(15)
    page = folder.report.read_text(encoding="utf-8")
    measured, expected = charts(page)["val_bits_per_byte"]["curves"]
    assert (measured["label"], expected["label"]) == ("measured", "forecast of the end")
    assert expected["points"] == [[30, 3000, 60, 2.5, 2.25, 3]]
    assert "Forecast of the end 2.500" in read(page)


def test_values_have_the_decimals_and_units_of_their_metric() -> None:
    shown = {chart.name: (chart.title, chart.unit, chart.digits) for chart in (LOSS, *CHARTS, SCORES)}
    assert shown == {
        "loss": ("Loss", "nats per token", 4),
        "val_bits_per_byte": ("Validation bits per byte", "bits per byte", 4),
        "learning_rate": ("Learning rate", "", None),
        "grad_norm": ("Gradient norm", "before clipping", 3),
        "tokens_per_second": ("Throughput", "tokens per second", 0),
        "expert_load": ("Load of the busiest expert", "multiple of the mean", 3),
        "balance_loss": ("Load-balancing loss", "", 4),
        "scores": ("Cloze accuracy", "share of the items", 3),
    }
    # The start of these is cut off, so that the rest is not flat.
    assert {chart.name for chart in (LOSS, *CHARTS, SCORES) if chart.falls} == {"loss", "val_bits_per_byte"}


def test_options_that_differ_from_their_defaults_are_known(tmp_path: Path) -> None:
    config = PretrainConfig(seed=7, output_dir=str(tmp_path / "my-run"))
    data: Any = SimpleNamespace(report=SimpleNamespace(lines=lambda: ["training    1 documents"]))
    facts = run_facts(config, RunFolder(tmp_path / "my-run"), [], data, {}, 40)
    listed = [option for section in facts.options.values() for option in section]
    assert {flag for flag, _, is_default in listed if not is_default} == {"--seed", "--output-dir"}
    assert ("--seed", "7", False) in listed
    assert ("--hidden-size", "512", True) in listed
    assert (facts.name, facts.total_steps, facts.data) == ("my-run", 40, ["training    1 documents"])
    assert (
        run_facts(dataclasses.replace(config, run_name="x"), RunFolder(tmp_path), [], data, {}, 1).name == "x"
    )


def test_scores_have_a_chart(folder: RunFolder) -> None:
    text = folder.metrics.read_text().removesuffix('{"step": 40, "lo')
    folder.metrics.write_text(text + line(30, cloze_en=0.5))
    LiveReport(folder, FACTS)._write(15)
    (curve,) = charts(folder.report.read_text(encoding="utf-8"))["scores"]["curves"]
    assert (curve["label"], curve["points"]) == ("English", [[30, 3000, 60, 0.5]])


def test_nothing_of_a_run_becomes_markup() -> None:
    facts = RunFacts(
        HOSTILE,
        1,
        [("model", HOSTILE)],
        [HOSTILE],
        {HOSTILE: [(HOSTILE, HOSTILE, False)]},
        {HOSTILE: HOSTILE},
    )
    state = RunState(
        samples={HOSTILE: [(1, HOSTILE)]},
        spikes=[{"step": HOSTILE, "documents": [{"loss": HOSTILE, "text": HOSTILE}]}],
        warnings=[HOSTILE],
        end=HOSTILE,
    )
    page = report_html(facts, state, 1.0)
    parsed = Parsed(page)
    assert parsed.all("img") == []
    assert len(parsed.all("script")) == 2
    assert page.count("&lt;img src=x onerror") >= 10
    assert_self_contained(page)


def test_a_page_of_100_000_steps_has_less_than_500_kb() -> None:
    """Also where every text is as long as possible and of characters that grow when they are escaped."""
    steps = array("d", range(100_000))
    values = array("d", (2.0 + (step * 7919 % 1000) / 997 for step in range(100_000)))
    long = '"&' * 5000
    state = RunState(
        series=dict.fromkeys(DRAWN, (steps, values)),
        samples={f"{long}{n}": [(step, long) for step in range(100)] for n in range(6)},
        spikes=[{"step": n, "loss": 1.0, "documents": [{"loss": 1.0, "text": long}] * 3} for n in range(100)],
        warnings=[long] * 100,
        end=long,
    )
    for step in range(0, 100_000, 1000):
        state.clock.add({"step": step, "tokens": step * 65_537, "elapsed": step * 0.2137, "time": None})
    facts = dataclasses.replace(FACTS, data=[long] * 100, environment={f"{n}": long for n in range(30)})
    page = report_html(facts, state, 15)
    assert 100_000 < len(page.encode()) < 500_000
    # The latest of each, samples evenly spread.
    counts = [len(re.findall(f'id="{name}-\\d', page)) for name in ("samples", "spike", "documents")]
    assert counts == [4, 15, 15]
    assert "Step 99: loss" in page
    assert "Step 84: loss" not in page
    for text, number in (("Step 0<", 4), ("Step 99<", 4), ("Step 9<", 4), ("Step 1<", 0), ("Step 90<", 4)):
        assert page.count(text) == number, text
    assert len(Parsed(page).all("li")) == 20  # warnings
    (lines,) = re.findall(r"Report on the training data(.*?)</table>", page, re.DOTALL)
    assert lines.count("<tr") == 40
    assert (
        max(
            map(
                len,
                re.findall("a+", report_html(dataclasses.replace(FACTS, rows=[("x", "a" * 999)]), state, 1)),
            )
        )
        == 600
    )


def test_a_page_starts_with_the_numbers_to_see_first() -> None:
    last = {
        **{"loss": 2.5, "val_loss": 2.25, "val_bits_per_byte": 1.125, "val_forecast_bits_per_byte": 1.0},
        **{"tokens": 12_345, "tokens_per_second": 500.0, "mfu": 0.25, "eta_seconds": 90.0},
        **{"skipped_steps": 2, "grad_norm": 1.0},
    }
    state = RunState(
        last=last, step=20, spikes=[{"step": 3}], totals={"training": 3.0, "saving": 1.0, "data": 0.01}
    )
    state.clock.add({"step": 20, "tokens": 12_345, "elapsed": 30.0, "time": None})
    numbers = {
        **{"Training loss": "2.5000", "Validation loss": "2.2500", "Bits per byte": "1.1250"},
        **{"Forecast of the end": "1.000", "Tokens trained": "12.3k", "Tokens per second": "500"},
        **{"MFU": "25.0%", "Training time": "30s", "Time left": "1m30s"},
        **{"Skipped updates": "2", "Loss spikes": "1"},
    }

    def tiles(page: str) -> dict[str, str]:
        return dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page))

    page = report_html(FACTS, state, 15)
    assert tiles(page) == numbers
    for text in ('class="badge live">Training<', 'value="20" max="40"', "Step 20 of 40 (50%)"):
        assert text in page
    assert re.findall('<rect class="f(.)" x="(.*?)" width="(.*?)"', page) == [
        ("0", "0.0", "750.0"), ("1", "750.0", "250.0"),
    ]  # fmt: skip
    assert re.findall(r"</span>(\w+ ?\w* \w+)\s+<span class=\"unit\">(.*?)</span>", page) == [
        ("Training steps 3s", "75.0%"), ("Saving 1s", "25.0%"),
    ]  # fmt: skip
    # The totals of a run that ended take the place of the last report.
    state.last |= {"total_tokens_per_second": 400.0, "total_mfu": 0.2, "skipped_steps": 0}
    state.end, state.spikes = "", []
    for problem, badge in (
        (True, 'class="badge problem">Ended early<'),
        (False, 'class="badge done">Finished<'),
    ):
        state.problem = problem
        assert badge in (page := report_html(FACTS, state, 15))
    gone = ("Forecast of the end", "Time left", "Skipped updates", "Loss spikes")
    left = {name: text for name, text in numbers.items() if name not in gone}
    assert tiles(page) == {**left, "Tokens per second": "400", "MFU": "20.0%"}
    assert json.loads(Parsed(page).scripts[0])["reload"] == 0


def test_a_tab_can_follow_a_running_run(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_report, "FIRST_SECONDS", 0.01)
    monkeypatch.setattr(live_report, "REFRESH_SECONDS", 0.01)

    def wait_for(points: int) -> str:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if folder.report.exists():
                page = folder.report.read_text(encoding="utf-8")
                Parsed(page)  # whole whenever it is read
                if len(charts(page)["loss"]["curves"][0]["points"]) == points:
                    return page
            time.sleep(0.01)
        raise AssertionError(f"no page with {points} reports")

    with LiveReport(folder, FACTS) as report:
        page = wait_for(3)
        assert "Follow the run" in page
        assert json.loads(Parsed(page).scripts[0])["reload"] > 0
        with folder.metrics.open("a") as file:
            file.write('ss": 4.0}\n')  # the rest of the line that was torn
        assert "Step 40 of 40" in wait_for(4)
        # A rewind has removed lines.
        folder.metrics.write_text(training(10, 7.0))
        report.reread()
        wait_for(1)
        assert report.finish("The model is saved.") is not None
    assert "Follow the run" not in folder.report.read_text(encoding="utf-8")


def test_the_page_takes_a_bounded_share_of_the_time(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    report = LiveReport(folder, FACTS)
    monkeypatch.setattr(live_report.time, "thread_time", iter((0.0, 0.02, 1.0, 1.5)).__next__)
    monkeypatch.setattr(report._stop, "wait", lambda seconds: waits.append(seconds) or len(waits) > 2)
    report._run()
    assert waits == [3.0, 15.0, 100.0]


def test_a_run_that_fails_says_so_on_its_page(folder: RunFolder) -> None:
    with pytest.raises(MemoryError), LiveReport(folder, FACTS):
        raise MemoryError("out of memory")
    assert "Ended early" in (shown := read(folder.report.read_text(encoding="utf-8")))
    assert "MemoryError: out of memory." in shown


def test_a_disk_that_refuses_the_page_is_reported_once_and_does_not_stop_the_run(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "create_file", refuse)
    warnings: list[str] = []
    report = LiveReport(folder, FACTS, warn=warnings.append)
    report._write(15)
    assert report.finish("The model is saved.") is None
    assert warnings == [f"{folder.report} cannot be written (No space left on device); training continues."]


def test_there_is_no_page_before_the_first_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="early"), LiveReport(RunFolder(tmp_path), FACTS):
        raise ValueError("early")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_phone_shows_the_page_without_scrolling_sideways(folder: RunFolder, tmp_path: Path) -> None:
    report = LiveReport(folder, FACTS, warnings=["w" * 300], totals=lambda: {"training": 9.0})
    report.finish("The model is saved.")
    page = folder.report.read_text(encoding="utf-8")
    # The page's own policy forbids this script.
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', page)
    assert policy is not None
    width = "<script>document.title = document.documentElement.scrollWidth + '/' + innerWidth</script></body>"
    page = page.replace(policy[0], "").replace("</body>", width)
    (tmp_path / "browser").mkdir()
    (tmp_path / "browser" / "page.html").write_text(page, encoding="utf-8")
    dom = open_in_chromium(tmp_path / "browser" / "page.html", "--dump-dom", "--window-size=500,900")
    (needed, given) = re.findall(r"<title>(\d+)/(\d+)</title>", dom)[0]
    assert int(given) == 500
    assert int(needed) <= 500
    figure = dom.split('id="chart-loss"')[1].split("</figure>")[0]
    assert len(re.findall(r'<path class="line c[01] d[01]" d="M[^"]+L[^"]+"', figure)) == 2
    assert "training ends at 5.0000; validation ends at 5.5000" in figure
