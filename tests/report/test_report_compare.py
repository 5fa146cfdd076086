"""Page of a comparison: its numbers, optional sections, hostile text, size, and a real browser."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import browser, chromium

from trivium.cli import main
from trivium.compare.verdict import judge
from trivium.errors import DataError
from trivium.report.compare import collect, rewrite, write

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202eevil"


def final(rng: random.Random, quality: float, kl: float | None) -> dict[str, Any]:
    record: dict[str, Any] = {"n": 50, "length": 20 + rng.random(), "kl": kl}
    for name, shift in (("greedy", 0.0), ("sampled", -0.1)):
        record |= {name: quality + shift, f"{name}_low": quality + shift - 0.05,
                   f"{name}_high": quality + shift + 0.05}  # fmt: skip
    return record


def make_run_record(rng: random.Random, seed: int, quality: float, points: int) -> dict[str, Any]:
    costs = ("seconds", "generated_tokens", "trained_tokens", "flops")
    curve = [
        {"step": i, **dict.fromkeys(costs, 100.0 * i), "reward": 0.1}
        | final(rng, 0.2 + (quality - 0.2) * i / points, i / points)
        for i in range(points + 1)
    ]
    return {
        "seed": seed,
        "path": f"runs/x/seed-{seed}",
        "final": final(rng, quality, 1.0),
        "win_rate": {"mean": 0.7, "low": 0.6, "high": 0.8},
        "outcomes": {"index": [0, 1], "greedy": [0.0, 1.0], "sampled": [[0.0], [1.0]]},
        "spent": dict.fromkeys(costs, 100.0 * points),
        "curve": curve,
        "alarms": [{"monitor": "kl", "step": 3, "seen": "KL rose to 12"}] if seed == 1 else [],
        "training": {"steps": points, "advantage/std": {"first": 1.0, "last": 0.5}},
    }


def memory() -> dict[str, Any]:
    model = {"role": "policy", "parameters": 1 << 20, "gradients": 1 << 20, "optimizer": 2 << 20,
             "activations": 3 << 20, "cache": 0}  # fmt: skip
    stages = [{"name": "update", "models": [model]}]
    return {
        "measured_bytes": 8 << 20,
        "predicted_bytes": 7 << 20,
        "accuracy": "±10 %",
        "predicted": {"stages": stages},
    }


def gap(mean: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "seeds": [mean]}


def comparison(
    names: list[str], seeds: int = 3, points: int = 6, *, rich: bool = True
) -> dict[str, Any]:
    """Return a comparison in the format of ``trivium compare``."""
    rng = random.Random(0)
    methods = []
    for i, name in enumerate(names):
        quality = 0.3 + 0.5 * i / len(names)
        runs = [make_run_record(rng, seed, quality + 0.01 * seed, points) for seed in range(seeds)]
        varied = [
            {"setting": "beta", "value": 10.0**-k, **make_run_record(rng, 0, quality - 0.02 * k, 2)}
            for k in range(5 if rich and i < 3 else 0)
        ]
        stage = {
            "name": "grpo", "job": f"{i}/grpo", "command": "grpo", "config": "c.yaml",
            "signal": "reward: correct", "advantage": "reward minus the mean", "steps": points,
            "sampling": "during training, 8 per prompt", "spent": runs[0]["spent"],
            "hyperparameters": {"beta": 0.1, "learning_rate": 1e-3},
        }  # fmt: skip
        if rich:
            stage["memory"] = memory()
        mean = {
            "mean": quality,
            "low": quality - 0.05,
            "high": quality + 0.05,
            "seeds": [quality + 0.01 * seed for seed in range(seeds)],
            "over": "prompts",
        }
        methods.append(
            {"name": name, "command": "grpo", "best_of": None, "stages": [stage], "runs": runs,
             "varied": varied, "greedy": mean, "sampled": mean}
        )  # fmt: skip
    pairs = [[a, b] for i, a in enumerate(names) for b in names[i + 1 :]]
    result: dict[str, Any] = {
        "title": "A comparison",
        "base": "runs/sft/final",
        "budget": {"currency": "generated_tokens", "amount": 600.0},
        "seeds": list(range(seeds)),
        "n": 50,
        "bases": {"0": {**final(rng, 0.25, None)}},
        "unit": "share",
        "methods": methods,
        "differences": [{"methods": p, **gap(-0.2)} for p in pairs],
        "gains": [{"method": name, **gap(0.3)} for name in names],
    }
    base = {"mean": 0.25, "low": 0.2, "high": 0.3, "seeds": [0.25], "over": "prompts"}
    result["base_quality"] = {"greedy": base, "sampled": base}
    if rich:
        result["credit"] = [
            {"method": n, "snr": 1.0 + i, "snr_low": 0.5 + i, "snr_high": 1.5 + i, "cosine": 0.5,
             "batches": 8, "empty": 0}
            for i, n in enumerate(names)
        ]  # fmt: skip
        point = {"accuracy": 0.8, "low": 0.7, "high": 0.9, "pairs": 30}
        ranked = {"points": [{"step": 0, **point}, {"step": 9, **point}], "without_updates": point}
        result["risk"] = {
            "coverage": [{"method": names[0], "base": 0.9, "final": 0.4, "responses": 256}],
            "reward_model": [{"method": names[-1], **ranked, "updates": []}],
        }
    result["verdict"] = judge(result)
    return result


NAMES = ["GRPO, outcome", "PPO, verifier", "DPO", "SFT on the best samples"]


def test_page_has_every_number_except_those_of_single_prompts() -> None:
    result = comparison(NAMES)
    data = collect(result)
    assert data["unit"] == "share"
    assert data["verdict"] == result["verdict"]
    for shown, method in zip(data["methods"], result["methods"], strict=True):
        assert shown["greedy"] == method["greedy"]
        assert [r["final"] for r in shown["runs"]] == [r["final"] for r in method["runs"]]
        assert not any("outcomes" in r for r in [*shown["runs"], *shown["varied"]])


def test_report_command_writes_the_page_of_a_comparison(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(comparison(NAMES)))
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "SFT on the best samples" in text
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "report.html")]) == 2
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        rewrite(tmp_path)


def test_a_comparison_from_before_the_renaming_is_refused(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps({"title": "old"}))
    with pytest.raises(DataError, match="no key 'methods': it was written before version"):
        rewrite(tmp_path)
    old = {k: v for k, v in comparison(NAMES).items() if k != "gains"}
    (tmp_path / "comparison.json").write_text(json.dumps(old))
    with pytest.raises(DataError, match="no key 'gains': it was written before version"):
        rewrite(tmp_path)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    result = comparison([HOSTILE, "DPO"])
    result["title"] = HOSTILE
    text = write(tmp_path, result).read_text(encoding="utf-8")
    assert "<script>alert(1)" not in text and "<img" not in text
    assert "\x1b" not in text and "\u202e" not in text


def test_page_of_many_methods_and_seeds_is_below_6_mb(tmp_path: Path) -> None:
    result = comparison([f"method {i}" for i in range(12)], seeds=5, points=200)
    assert write(tmp_path, result).stat().st_size < 6_000_000


def test_report_needs_neither_torch_nor_network(tmp_path: Path) -> None:
    code = "import sys, trivium.report.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    text = write(tmp_path, comparison(NAMES)).read_text(encoding="utf-8")
    assert "default-src 'none'" in text.replace("&#x27;", "'")


@pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")
@pytest.mark.parametrize("rich", [True, False])
def test_browser_draws_every_section_and_makes_no_request(tmp_path: Path, rich: bool) -> None:
    hostile = write(tmp_path, comparison([HOSTILE, *NAMES], rich=rich, seeds=3 if rich else 1))
    with browser() as page:
        for width in (1280, 390):
            page.resize(width, 900)
            page.open(hostile.as_uri())
            assert page.run("document.documentElement.scrollWidth") <= width
            shown = page.run("[...document.querySelectorAll('main > section')].map((s) => s.id)")
            optional = ["credit"] if rich else []
            expected = ["verdict", "quality", "table", "frontier", "cost", *optional, "risk"]
            assert shown == expected
            assert page.run("document.querySelectorAll('svg[role=img]').length") >= 3
            page.run("document.querySelector('[data-key=\"decoding:sampled\"]').click()")
            page.run("document.querySelector('[data-key=\"currency:flops\"]').click()")
            page.wait(0.3)
            assert page.run("document.body.innerText").count("alert(1)") > 0, "shown, not run"
        assert page.messages == []
        assert {r for r in page.requests if not r.startswith("data:")} == {hostile.as_uri()}


@pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")
def test_browser_shows_a_tie_as_a_sentence_and_folds_equal_rows(tmp_path: Path) -> None:
    names = [f"method {i} with a name of some length" for i in range(6)]
    result = comparison(names, seeds=3)
    for method, beta in zip(result["methods"], (0.0, 0.1, 0.2, 0.3, 0.4, 0.5), strict=True):
        method["stages"][0]["hyperparameters"] = {"beta": beta, "epochs": 2}
        method["stages"][0]["memory"]["measured_bytes"] = 384
    for pair in result["differences"]:
        pair |= gap(0.01)
    result["verdict"] = judge(result)
    page_path = write(tmp_path, result)
    with browser() as page:
        page.resize(1280, 900)
        page.open(page_path.as_uri())
        assert page.run("document.querySelector('h1').textContent") == (
            "A tie: 6 methods are level in quality"
        )
        subtitle = page.run("document.querySelector('h1 + .note').textContent")
        assert subtitle.startswith("a budget of 600 generated tokens for each method · 50 held-out")
        tables = "[...document.querySelectorAll('#table .wide')]"
        widths = page.run(f"{tables}.map((t) => [t.scrollWidth, t.clientWidth])")
        assert all(content <= width for content, width in widths), "six methods without scrolling"
        page.run("document.querySelectorAll('#table details').forEach((d) => (d.open = true))")
        rows = "[...document.querySelectorAll('#table .scroll:not(.wide) tbody tr')]"
        equal = page.run(f"{rows}.map((r) => r.textContent)")
        assert "epochs2" in equal and not any(row.startswith("beta") for row in equal)
        text = page.run("document.querySelector('#table').textContent")
        assert "384 B measured, 7 MiB predicted (±10 %)" in text and "e−" not in text
        quality = page.run("document.querySelector('#quality .note').textContent")
        assert quality.startswith("with 95 % intervals over prompts; small dots are seeds")
        assert page.messages == []
