"""Docstrings, comments, messages and docs are plain American English in the field's own words.

Run as a script, it lists every offense: ``python tests/test_language.py [PATH …]``.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PROSE = {".md", ".yaml", ".html", ".css"}
LEFT_OUT = (
    "trivium/report/assets/",
    "tests/test_language.py",
    "trivium/config/renamed.py",  # the old names
    "CHANGELOG.md",
)

TURNS = [
    r"go(?:es)? on\b(?! to)",
    r"\bgoing on\b",
    r"\banew\b",
    r"\bso many\b",
    r"\bwhere (?:it|they) lies?\b",
    r"\b(?:no one|nobody|nothing) reads\b",
    r"\bbe as it was\b",
    r"\bas if it had not been\b",
    r"\blet nothing\b",
    r"\bwith less ado\b",
    r"\bsizeable helpings?\b",
    r"\bin whose words\b",
    r"\bround otherwise\b",
    r"\bis asked of\b",
    r"\bto be had\b",
    r"\bfor next to nothing\b",
    r"\bin vain\b",
    r"\bmay have it\b",
    r"\bas can be\b",
    r"\bof whose\b",
    r"\bby itself alone\b",
    r"\bwho asks\b",
    r"\bwhoever\b",
    r"\bbrought back\b",
    r"\bfed along\b",
    r"\bnothing is told\b",
    r"\bof its own accord\b",
    r"\broads?\b",
    r"\blean (?:pass|layers?)\b",
    r"\bhelpings?\b",
    r"\bcut off\b",
    r"\blearns? together\b",
]
"""Turns of phrase that are not used."""

HEADS = ("What", "Where", "Let", "Be", "Whom", "Whose", "Who")
"""Words that no docstring begins with."""

BRITISH = re.compile(
    r"(?i)\b\w*(?:optimis|normalis|generalis|summaris|recognis|initialis|minimis|maximis|organis|"
    r"tokenis|randomis|penalis|utilis|memoris|serialis|quantis|regularis|parallelis)"
    r"(?:e|es|ed|er|ers|ing|ation|ations)\b"
    r"|\b(?:re|un)?(?:behaviour|colour|favour|neighbour|honour)\w*"
    r"|\b\w*(?:centre|centred|labell(?:ed|ing)|modell(?:ed|ing)|cancell(?:ed|ing)|grey)\b"
    r"|\b(?:analyse|judgement|whilst|catalogue|artefact|licence)\w*\b"
)
TURN = re.compile("(?i)" + "|".join(TURNS))


def files() -> list[Path]:
    """Every file of the repository that people read."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return [
        REPOSITORY / name
        for name in listed
        if not name.startswith(LEFT_OUT)
        and Path(name).suffix in {*PROSE, ".py", ".js"}
        and (REPOSITORY / name).is_file()
    ]


def offenses(path: Path) -> Iterator[str]:
    """Every offense in a file, as ``place: words``."""
    name = path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path
    text = path.read_text(encoding="utf-8")
    pieces = _python(text) if path.suffix == ".py" else enumerate(text.splitlines(), 1)
    for line, piece in pieces:
        joined = " ".join(piece.split())
        for pattern in (TURN, BRITISH):
            for match in pattern.finditer(joined):
                context = joined[max(0, match.start() - 40) :][:100]
                yield f"{name}:{line}: {match[0]!r} in {context!r}"
    if path.suffix == ".py":
        for line, head in _docstring_heads(text):
            yield f"{name}:{line}: a docstring begins with {head!r}"


def _python(text: str) -> Iterator[tuple[int, str]]:
    """The strings of a module, comments that follow each other joined, and its names."""
    comment: list[str] = []
    start = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            start = start if comment else token.start[0]
            comment.append(token.string.lstrip("# "))
        elif comment and token.type not in (tokenize.NL, tokenize.NEWLINE):
            yield start, " ".join(comment)
            comment = []
        if token.type == tokenize.STRING or (
            token.type == tokenize.NAME and BRITISH.fullmatch(token.string)
        ):
            yield token.start[0], token.string


def _docstring_heads(text: str) -> Iterator[tuple[int, str]]:
    """The first words of docstrings, of fields' too, that do not stand alone."""
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                continue
            value = statement.value.value
            if isinstance(value, str) and (words := value.split()) and words[0] in HEADS:
                yield statement.lineno, " ".join(words[:4])


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_words_are_plain(path: Path) -> None:
    assert list(offenses(path)) == []


@pytest.mark.parametrize(
    "text",
    [
        '"""What a thing is."""\n',
        "# The run goes on when\n# its command is given.\n",
        'raise ValueError("normalise the rewards")\n',
        'def f():\n    """Let all rows go."""\n',
        "optimiser = 1\n",
    ],
)
def test_an_offense_is_found(tmp_path: Path, text: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(text, encoding="utf-8")
    assert list(offenses(path))


if __name__ == "__main__":
    chosen = [Path(p).resolve() for p in sys.argv[1:]]
    found = [
        offense
        for path in files()
        if not chosen or any(path == p or path.is_relative_to(p) for p in chosen)
        for offense in offenses(path)
    ]
    print(*found, sep="\n")
    sys.exit(bool(found))
