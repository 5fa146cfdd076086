"""Draw the package diagram, ``architecture.svg``: ``python docs/pictures/architecture.py``.

Every package of Trivium is in one layer, and imports point down. A test compares the layers with
the packages that exist.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

LAYERS: list[tuple[str, list[tuple[str, str]]]] = [
    ("entry", [("cli", "the command line"), ("demo", "every method on an embedded task")]),
    (
        "uses of a run",
        [
            ("commands", "sample, pairs, evaluate, chat"),
            ("compare", "methods at equal budget"),
            ("pipelines", "named stages"),
            ("jobs", "stages as processes"),
            ("memory", "predicted before a run"),
            ("report", "a run as one page"),
        ],
    ),
    ("algorithms", [("algorithms", "sft · reward_model · ppo · dpo · grpo: one file each")]),
    ("training", [("training", "setup, experience, micro-batches, optimizer, run loop")]),
    ("runs", [("runs", "run directory, checkpoints, resume, budget")]),
    (
        "watching",
        [("evaluation", "held-out quality with intervals"), ("monitoring", "metrics and alarms")],
    ),
    ("rollout", [("rollout", "sampling: engine, key-value cache")]),
    ("rewards", [("rewards", "reward functions, verifiers, sandbox")]),
    (
        "models",
        [
            ("models", "policy, critic, reference, reward model"),
            ("models/cpu", "guest: the CPU's fast path"),
        ],
    ),
    ("checkpoints", [("hf", "Hugging Face checkpoints, in and out")]),
    ("data", [("data", "rows, chat templates, groups, batches")]),
    (
        "ground",
        [
            ("config", "typed, strict, from YAML"),
            ("maths", "every equation, a pure function"),
            ("tasks", "the embedded word problems"),
        ],
    ),
]
"""The layers from top to bottom: each package and what it holds."""

WIDTH, BOX_HEIGHT, GAP, MARGIN = 900, 46, 24, 12
STYLE = """
  .box { fill: #eef1fb; stroke: #5468b8; stroke-width: 1.2; rx: 6; }
  .guest { stroke-dasharray: 5 4; }
  .name { font: 600 15px ui-monospace, monospace; fill: #26306b; }
  .purpose { font: 13px system-ui, sans-serif; fill: #4b5066; }
  .arrow { stroke: #8a93b8; stroke-width: 1.6; fill: none; }
  .head { fill: #8a93b8; }
  @media (prefers-color-scheme: dark) {
    .box { fill: #232a45; stroke: #8f9ee6; }
    .name { fill: #dfe4ff; }
    .purpose { fill: #b8bfda; }
  }
"""


def draw() -> str:
    """Return the picture as SVG."""
    parts: list[str] = []
    y = float(MARGIN)
    for index, (_, boxes) in enumerate(LAYERS):
        width = (WIDTH - 2 * MARGIN - GAP * (len(boxes) - 1)) / len(boxes)
        for column, (name, purpose) in enumerate(boxes):
            parts += _box(MARGIN + column * (width + GAP), y, width, name, purpose)
        if index + 1 < len(LAYERS):
            parts += _arrow(WIDTH / 2, y + BOX_HEIGHT + 3, y + BOX_HEIGHT + GAP - 3)
        y += BOX_HEIGHT + GAP
    height = y - GAP + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">',
            "<title>Packages of Trivium; imports point down</title>",
            f"<style>{STYLE}</style>",
            *parts,
            "</svg>\n",
        ]
    )


def _box(x: float, y: float, width: float, name: str, purpose: str) -> list[str]:
    kind = "box guest" if purpose.startswith("guest") else "box"
    middle = x + width / 2
    return [
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{BOX_HEIGHT}"/>',
        f'<text class="name" x="{middle:g}" y="{y + 19:g}" text-anchor="middle">'
        f"{escape(name)}</text>",
        f'<text class="purpose" x="{middle:g}" y="{y + 37:g}" text-anchor="middle">'
        f"{escape(purpose)}</text>",
    ]


def _arrow(x: float, top: float, bottom: float) -> list[str]:
    return [
        f'<path class="arrow" d="M{x:g} {top:g}V{bottom - 6:g}"/>',
        f'<path class="head" d="M{x - 5:g} {bottom - 8:g}h10l-5 8z"/>',
    ]


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
