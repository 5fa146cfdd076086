"""Page of a pipeline: the results of every stage, unfinished and hostile ones, and a browser."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import browser, chromium
from helpers.report_runs import embedded, evaluation, make_run

from trivium.cli import main
from trivium.errors import DataError
from trivium.report.pipeline import MAX_STEPS, collect, write

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202eevil"


def stage(name: str, command: str, state: str = "finished", **fields: Any) -> dict[str, Any]:
    return {
        "name": name, "command": command, "config": f"{name}.yaml", "signal": "demonstrations",
        "advantage": None, "sampling": "none", "hyperparameters": {"beta": 0.1},
        "spent": {"seconds": 3.0, "generated_tokens": 70, "trained_tokens": 0, "flops": 2e9},
        "steps": 2, "state": state, "seconds": 4.5, "uses": [], "product": f"{name}/final",
    } | fields  # fmt: skip


def make_pipeline(directory: Path, title: str = "Mine", steps: int = 3) -> Path:
    """Write a pipeline of a run, rows, an evaluation, and a stage that did not run."""
    alarm = {"kind": "alarm", "monitor": "kl", "metric": "kl", "step": 2, "seen": title}
    make_run(
        directory / "grpo",
        metrics=[{"step": n, "reward/mean": n / steps, "loss": 1.0} for n in range(1, steps + 1)],
        evaluation=[evaluation(steps, 0.75, kl=1.5, length=9.0)],
        events=[alarm],
    )
    for name in ("pairs", "evaluate"):
        (directory / name).mkdir()
    (directory / "pairs" / "rows.counts.json").write_text('{"prompts": 4, "pairs": 3}')
    result = {"n": 50, "greedy": 0.8, "greedy_low": 0.7, "greedy_high": 0.9, "sampled": 0.5}
    (directory / "evaluate" / "evaluation.json").write_text(json.dumps(result))
    stages = [
        stage("pairs", "pairs", signal=title),
        stage("grpo", "grpo", "changed", uses=["pairs"]),
        stage("evaluate", "evaluate", uses=["grpo"]),
        stage("later", "dpo", "new", steps=None, seconds=0.0),
    ]
    record = {"title": title, "seed": 3, "stages": stages}
    (directory / "pipeline.json").write_text(json.dumps(record))
    return directory


def test_every_stage_has_what_its_files_say(tmp_path: Path) -> None:
    pairs, grpo, evaluate, later = collect(make_pipeline(tmp_path))["stages"]
    assert pairs["counts"] == {"prompts": 4, "pairs": 3} and pairs["evaluation"] is None
    assert grpo["report"] == "grpo/report.html" and len(grpo["alarms"]) == 1
    assert grpo["evaluation"]["greedy"] == 0.75 and grpo["evaluation"]["kl"] == 1.5
    assert evaluate["evaluation"] == {
        "n": 50, "greedy": 0.8, "greedy_low": 0.7, "greedy_high": 0.9, "sampled": 0.5,
    }  # fmt: skip
    assert later["report"] is None and later["curves"] == [] and later["evaluation"] is None


def test_curves_of_a_long_stage_are_thinned_but_keep_their_end(tmp_path: Path) -> None:
    stages = collect(make_pipeline(tmp_path, steps=2000))["stages"]
    (reward,) = (
        series
        for chart in stages[1]["curves"]
        for series in chart["series"]
        if series["name"] == "reward/mean"
    )
    assert len(reward["steps"]) <= MAX_STEPS and reward["steps"][-1] == 2000


def test_report_command_writes_the_page_and_those_of_its_runs(tmp_path: Path) -> None:
    directory = make_pipeline(tmp_path)
    assert main(["report", str(directory)]) == 0
    data = embedded((directory / "report.html").read_text(encoding="utf-8"))
    assert [s["name"] for s in data["stages"]] == ["pairs", "grpo", "evaluate", "later"]
    page = directory / "grpo" / "report.html"
    assert embedded(page.read_text(encoding="utf-8"))["name"] == "grpo"
    page.write_text("kept")
    write(directory)
    assert page.read_text() == "kept", "nothing was logged since it was written"


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "pipeline.json").write_text("{")
    with pytest.raises(DataError, match=r"pipeline\.json: cannot read the pipeline"):
        write(tmp_path)


def test_hostile_texts_stay_data(tmp_path: Path) -> None:
    text = write(make_pipeline(tmp_path, HOSTILE)).read_text(encoding="utf-8")
    assert "<script>alert(1)" not in text and "<img" not in text
    assert "\x1b" not in text and "\u202e" not in text


def test_report_needs_no_torch() -> None:
    code = "import sys, trivium.report.pipeline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")
def test_browser_draws_every_stage_and_makes_no_request(tmp_path: Path) -> None:
    page_file = write(make_pipeline(tmp_path, HOSTILE))
    with browser() as page:
        for width in (1280, 390):
            page.resize(width, 900)
            page.open(page_file.as_uri())
            assert page.run("document.documentElement.scrollWidth") <= width
            shown = page.run("[...document.querySelectorAll('main > section')].map((s) => s.id)")
            assert shown == ["stages", "course"]
            assert page.run("document.querySelectorAll('#stages tbody tr').length") == 4
            links = page.run("[...document.querySelectorAll('#stages td a')].map((a) => a.href)")
            assert links == [(tmp_path / "grpo" / "report.html").as_uri()]
            text = page.run("document.body.innerText")
            assert "0.750" in text and "0.800" in text and "to run again" in text
            assert text.count("alert(1)") > 0, "shown, not run"
            page.run("document.querySelector('summary').click()")
            page.wait(0.3)
            assert page.run("document.querySelectorAll('#course svg[role=img]').length") >= 3
        assert page.messages == []
        assert {r for r in page.requests if not r.startswith("data:")} == {page_file.as_uri()}
