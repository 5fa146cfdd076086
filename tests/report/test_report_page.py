"""Page of a report: hostile text, overwriting of files, and a real browser."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.browser import Page, browser, chromium
from helpers.report_runs import HOSTILE, embedded, evaluation, make_run, sample

from trivium.cli import main
from trivium.errors import ConfigurationError, DataError
from trivium.report.page import clip, encode, render_page
from trivium.report.run import collect, page, write

# --- The page -------------------------------------------------------------------------------------


def test_hostile_text_cannot_end_its_script_element(tmp_path: Path) -> None:
    rows = [
        sample(0, HOSTILE, prompt=[{"role": HOSTILE, "content": HOSTILE}], finish_reason=HOSTILE)
    ]
    rows[0]["rewards"] = {HOSTILE: 1.0}
    metrics = [{"step": 1, "elapsed": 1.0, f"rewards/{HOSTILE}/mean": 1.0}]
    events = [{"kind": "alarm", "monitor": HOSTILE, "step": 1, "seen": HOSTILE}]
    run = make_run(tmp_path / "a<b>&", f"# {HOSTILE.encode('ascii', 'ignore').decode()}",
                   metrics=metrics, samples=rows, events=events)  # fmt: skip
    html = page(collect(run))
    data = embedded(html)
    assert data["samples"]["rows"][0]["response"] == HOSTILE
    assert data["alarms"]["shown"][0]["seen"] == HOSTILE
    harmless = page(collect(make_run(tmp_path / "plain")))
    for sign in ("<script", "</script", "<!--", "alert(1)</"):
        assert html.count(sign) == harmless.count(sign)
    assert "<title>a&lt;b&gt;&amp; · Trivium</title>" in html
    assert not re.search("[\u2028\u202e\x1b\x00\ud800]", html)


def test_encoded_data_round_trips_and_contains_no_markup() -> None:
    text = encode({"a": HOSTILE, "b": [math.inf, 1.5]})
    assert json.loads(text) == {"a": HOSTILE, "b": ["Infinity", 1.5]}
    assert not set("<>&\u2028\u2029") & set(text)


def test_clipping_counts_encoded_bytes() -> None:
    assert clip("a<é\U0001f600", 13) == "a<é\U0001f600"
    assert clip("a<é\U0001f600", 12) == "a<é"
    assert clip("a<é\U0001f600", 6) == "a"
    assert clip("", 0) == ""


def test_security_policy_allows_only_own_scripts_and_no_requests() -> None:
    html = render_page("t", {}, ["tokens.js"])
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert "default-src &#x27;none&#x27;" in policy
    assert "connect-src &#x27;none&#x27;" in policy
    assert policy.count("sha256-") == html.count("<script>") == 6
    assert "unsafe-inline" not in policy.split("style-src")[0]
    assert not re.search(r"""(src|href)=["'](?!data:,|#)""", html.split("<body")[0])


def test_default_report_is_replaced_and_another_file_is_not(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert write(run) == write(run) == run / "report.html"
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    with pytest.raises(ConfigurationError, match=r"exists already.*--overwrite"):
        write(run, mine)
    assert mine.read_text() == "mine"
    assert write(run, mine, overwrite=True).read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.html", "run"]


def test_a_directory_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="is not the directory of a run"):
        write(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert "is not the directory of a run" in capsys.readouterr().err


def test_the_command_writes_to_the_given_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = make_run(tmp_path / "run"), tmp_path / "out.html"
    assert main(["report", str(run), "--output", str(output)]) == 0
    assert "written to" in capsys.readouterr().out
    assert embedded(output.read_text())["name"] == "run"


def test_report_and_watch_do_not_import_torch() -> None:
    code = "import sys, trivium.report.run, trivium.report.watch; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert found.stdout == b"False\n"


# --- In a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    if chromium() is None:
        pytest.skip("no Chromium is installed")
    with browser() as page_:
        yield page_


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    metrics = [
        {"step": s, "elapsed": 2.0 * s, "reward/mean": draw.random(), "kl/k1": 0.1 / s}
        | {"time/rollout": 1.0, "time/update": 0.5, "tokens/generated": 40}
        for s in range(1, 60)
    ]
    metrics[30]["reward/mean"] = "NaN"
    tokens = {"tokens": ["wo", "\u202erds"], "log_ratio": [0.5, -0.5], "response": "wo\u202erds"}
    rows = [sample(s, **tokens) for s in (0, 30, 59)] + [sample(59, HOSTILE * 2000, index=8)]
    rows.append(sample(59, "x" * 100_000 + "NEEDLE", index=9))
    alarm = {"kind": "alarm", "monitor": "kl", "step": 9, "metric": "kl/k1", "seen": HOSTILE}
    evaluations = [evaluation(0, 0.4), evaluation(59, 0.8)]
    run = make_run(tmp_path_factory.mktemp("runs") / "a", metrics=metrics, samples=rows,
                   evaluation=evaluations, events=[alarm])  # fmt: skip
    return write(run)


@pytest.mark.parametrize("width", [390, 1280])
def test_page_opens_from_disk_without_requests_messages_or_overflow(
    tab: Page, written: Path, width: int
) -> None:
    tab.requests.clear()
    tab.messages.clear()
    tab.resize(width, 900)
    tab.open(written.as_uri())
    parts = "[...document.querySelectorAll('main > section')].map((node) => node.id)"
    assert tab.run(parts) == ["outcome", "alarms", "curves", "evaluation", "cost", "samples",
                              "configuration"]  # fmt: skip
    assert tab.run("document.querySelectorAll('#curves svg').length") >= 4
    for key in ("view:all", "view:pair", "color:log_ratio", "x:elapsed", "smooth"):
        tab.run(f"document.querySelector('[data-key=\"{key}\"]').click()")
    tab.wait(0.3)
    assert tab.run("document.querySelectorAll('#samples [data-token]').length") >= 2
    assert tab.run("document.documentElement.scrollWidth - innerWidth") <= 0
    assert tab.requests == [written.as_uri()]
    assert tab.messages == []


def test_hostile_samples_are_shown_as_text_and_are_searchable(tab: Page, written: Path) -> None:
    tab.open(written.as_uri())
    tab.run("document.querySelector('[data-key=\"view:all\"]').click()")
    text = tab.run("document.querySelector('#samples').innerText")
    assert "<script>alert(1)</script>" in text
    assert "\\x1b" in text and "\\u202e" in text and "\\x00" in text
    assert not re.search("[\u202e\x1b\x00]", text)
    assert tab.run("document.querySelectorAll('#samples script').length") == 0
    search = "const box = document.querySelector('[data-key=search]'); box.value = 'needle';"
    tab.run(f"{{ {search} box.dispatchEvent(new Event('input')); }}")
    tab.wait(0.5)
    assert tab.run("document.querySelectorAll('#samples .card').length") == 1
    assert "Show all 100,006 characters" in tab.run("document.querySelector('#samples').innerText")
