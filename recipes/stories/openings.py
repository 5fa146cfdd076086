"""Write the story openings: prompts.jsonl for training, heldout.jsonl for evaluation.

The two files have no name and no sentence in common, so that evaluation measures generalization.
Sad, neutral and happy openings alternate; each allows a happy or a sad story.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

TRAINING = {
    "names": "Lily Tom Sara Ben Mia Max Anna Sam Lucy Tim".split(),
    "openings": [
        "Once upon a time, there was a child named {name}.",
        "One day, {name} went to the park to play.",
        "{name} was sad because the toy was broken.",
        "{name} had a little dog that liked to run.",
        "It was a rainy day and {name} had to stay inside.",
        "{name} saw a big box under the tree.",
        "{name} and a friend wanted the same ball.",
        "One night, {name} heard a loud noise.",
        "{name} walked into the forest and got lost.",
        "{name} was cold and hungry.",
        "{name} wanted to make a cake with mom.",
        "A bird sat on the window of {name}'s room.",
        "{name} did not want to go to bed.",
        "{name} fell down and hurt a knee.",
        "{name} found a shiny stone in the garden.",
        "{name} was angry and did not want to share.",
        "The sun was hot and {name} was thirsty.",
        "{name} climbed a tall tree.",
        "{name} could not find the red hat.",
        "Dad gave {name} a small boat.",
    ],
}
HELD_OUT = {
    "names": "Jack Emma Leo Molly Bob Kate Jim Ella Dan Rose".split(),
    "openings": [
        "Once there was a child called {name} who lived in a small house.",
        "{name} went to the beach with grandma.",
        "{name} cried because the balloon flew away.",
        "{name} had a cat that slept all day.",
        "It was very dark and {name} was scared.",
        "{name} opened the door and saw a frog.",
        "{name} and a brother had a fight.",
        "In the morning, {name} looked for a new game.",
        "{name} lost the key to the house.",
        "{name} was sick and had to rest.",
        "{name} helped a man carry apples.",
        "A mouse lived under {name}'s bed.",
        "{name} did not like the soup.",
        "{name} dropped the glass and it broke.",
        "{name} drew a picture of a fish.",
        "{name} was mean to the other kids.",
        "The snow was deep and {name} went out.",
        "{name} jumped over a puddle.",
        "{name} forgot the lunch at home.",
        "Mom read {name} a book about a bear.",
    ],
}


def rows(names: list[str], openings: list[str]) -> list[dict[str, str]]:
    """Return every opening for every name, sorted by name, so that a prefix has all openings."""
    return [{"prompt": o.format(name=name)} for name, o in product(names, openings)]


def main() -> None:
    """Write both files to the directory of this script."""
    directory = Path(__file__).resolve().parent
    for file, parts in (("prompts.jsonl", TRAINING), ("heldout.jsonl", HELD_OUT)):
        lines = [json.dumps(row) + "\n" for row in rows(**parts)]
        (directory / file).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
