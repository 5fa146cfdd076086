"""The docs' examples work, their links lead somewhere, and their tables match the code."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from trivium.commands import COMMANDS
from trivium.config.base import load_configuration
from trivium.config.renamed import RENAMED_ARGUMENTS, RENAMED_KEYS, RENAMED_METRICS

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [
    *REPOSITORY.glob("*.md"),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
GENERATED = ("configuration/", "api/")
"""Directories whose pages the docs build makes."""


def blocks(page: Path, language: str) -> list[str]:
    """Return the page's code blocks in a language."""
    return [text for kind, text in BLOCK.findall(page.read_text("utf-8")) if kind == language]


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def test_every_configuration_in_the_docs_is_accepted(tmp_path: Path) -> None:
    found = 0
    for page in PAGES:
        for text in blocks(page, "yaml"):
            named = re.match(r"# ([a-z-]+)\.yaml", text)
            if named is None or named[1] not in COMMANDS:
                continue
            path = tmp_path / f"{named[1]}.yaml"
            path.write_text(text, encoding="utf-8")
            load_configuration(COMMANDS[named[1]].config_class(), path)
            found += 1
    assert found >= 10


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_in_the_docs_is_valid(page: Path) -> None:
    for text in blocks(page, "python"):
        ast.parse(text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files_lead_to_files(page: Path) -> None:
    missing = [
        target
        for target in LINK.findall(BLOCK.sub("", page.read_text("utf-8")))
        if "://" not in target
        and not any(part in target for part in GENERATED)
        and not (page.parent / target).exists()
    ]
    assert missing == []


def test_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text("utf-8").splitlines()) < 120


def test_changelog_lists_every_renamed_key_metric_and_argument() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text("utf-8")
    for old, new in {**RENAMED_KEYS, **RENAMED_METRICS, **RENAMED_ARGUMENTS}.items():
        assert f"| `{old}` | `{new}` |" in text


def test_architecture_picture_shows_every_package() -> None:
    drawn = runpy.run_path(str(REPOSITORY / "docs" / "pictures" / "architecture.py"))
    names = {name for _, boxes in drawn["LAYERS"] for name, _ in boxes}
    packages = {path.parent.name for path in (REPOSITORY / "trivium").glob("*/__init__.py")}
    assert names == packages | {"cli", "models/cpu"}
    picture = REPOSITORY / "docs" / "pictures" / "architecture.svg"
    assert picture.read_text("utf-8") == drawn["draw"]()


# --- the examples of docs/extending.md ------------------------------------------------------------


def example(beginning: str) -> dict[str, Any]:
    """Run the example that begins with this line and return its names."""
    (text,) = (
        text
        for text in blocks(REPOSITORY / "docs" / "extending.md", "python")
        if text.startswith(beginning)
    )
    names: dict[str, Any] = {}
    exec(compile(text, "docs/extending.md", "exec"), names)
    return names


def test_outcome_reward_of_the_docs_scores_each_response() -> None:
    exact = example("# reward.py")["exact"]
    assert exact(["?", "?"], ["It is 4 ", "5"], answer=["4", "4"]) == [1.0, 0.0]


def test_step_reward_of_the_docs_marks_repeated_lines() -> None:
    new_lines = example("# steps.py")["new_lines"]
    assert new_lines(["a\n\nbb \na"]) == [[((0, 1), 1.0), ((3, 5), 1.0), ((7, 8), 0.0)]]


def test_median_advantage_of_the_docs_compares_within_groups() -> None:
    median = example("# median.py")["median_advantages"]
    rewards_N = torch.tensor([1.0, 0.0, 4.0, 2.0, 3.0])
    advantages_N = median(rewards_N, torch.tensor([3, 2]), scale="none")
    assert advantages_N.tolist() == [0.0, -1.0, 3.0, -0.5, 0.5]


def test_pieces_of_the_docs_give_a_gradient() -> None:
    logprobs_T = example("import torch")["logprobs_T"]
    assert torch.isfinite(logprobs_T.grad).all()
    assert logprobs_T.grad.abs().sum() > 0
