"""A step verifier: is every sum that a reasoning step writes down right?

It checks arithmetic, not reasoning: a step that correctly computes the wrong quantity is right
here. Equations with unknowns, words or units between the numbers are not understood and are left
out, rather than judged wrongly. Nothing is ever evaluated as code: an equation's sides are parsed
to a syntax tree in which only numbers, ``+ - * /`` and brackets may stand.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_LONGEST_SIDE = 200
_ARITHMETIC = "0123456789.+-*/() \t"
_ANNOTATION = re.compile(r"<<([^<>\n]*)>>")
_BULLET = re.compile(r"\A\s*[-*+•]\s+")
_SIGNS = str.maketrans({"−": "-", "–": "-", "×": "*", "÷": "/", "·": "*", "$": None, "\\": None})
_LATEX = re.compile(r"\\(times|cdot|div)(?![a-zA-Z])")
_LETTER_TIMES = re.compile(r"(?<=[\d.)])(\s*)[xX](\s*)(?=[\d.(])")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_PERCENT = re.compile(r"(?<![\w.])(\d*\.?\d+)\s*%")
_EQUALS = re.compile(r"(?<![=<>!])={1,2}(?!=)")
_BEFORE_NUMBER = re.compile(r"(?<=[\d.)])\s+(?=[\d.])")
_BEFORE_OPERAND = re.compile(r"(?<=[\d.)])\s+(?=[\d.(])")
_MIXED = re.compile(r"(?<![\d./])(\d{1,3})\s+(\d+/\d+)(?![\d/])")
_SPACED_THOUSANDS = re.compile(r"\d\s+\d{3}(?!\d)")
_WORD_OPERATOR = re.compile(r"(?:\b(?:[xX]|of|times|plus|minus|over)|\d\s+and)\s*\Z")
_GLUED_BEFORE = re.compile(r"(?:[\w^}!]|\d[:,])\Z")
_GOES_ON = re.compile(r"\s*\^|[:,]\d|\s*and\s+\(?\d+/|[a-zA-Z]\w*\s*[-+*/]")
_LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")


class _Side(NamedTuple):
    """One side of an equation: its value, None where undefined (1/0), and how it is written."""

    value: Fraction | None
    decimals: int  # digits after the point of a plain number; 0 for anything else
    pointed: bool  # whether a decimal point is in it
    computed: bool  # whether it holds an operation


def evaluate(expression: str) -> Fraction:
    """Return the exact value of numbers, ``+ - * /`` and brackets.

    Raises ValueError where there is anything else in it, and where it divides by zero.
    """
    value = _side(expression).value
    if value is None:
        raise ValueError(f"{expression!r:.80} divides by zero")
    return value


def _side(expression: str) -> _Side:
    if len(expression) > _LONGEST_SIDE or not set(expression) <= set(_ARITHMETIC):
        raise ValueError(f"not arithmetic: {expression!r:.80}")
    source = _LEADING_ZEROS.sub("", expression.strip())
    try:
        tree = ast.parse(source, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"not arithmetic: {expression!r:.80}") from error
    try:
        value = _value(tree, source)
    except ZeroDivisionError:
        value = None
    plain = re.fullmatch(r"-?\s*\d*\.(\d+)", source)
    return _Side(value, len(plain[1]) if plain else 0, "." in source, _computes(tree))


def _value(node: ast.expr, source: str) -> Fraction:
    if isinstance(node, ast.Constant):
        # The written digits, not the float that Python read from them.
        return Fraction(source[node.col_offset : node.end_col_offset])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, source)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        apply = _OPERATORS[type(node.op)]
        return apply(_value(node.left, source), _value(node.right, source))
    raise ValueError("only numbers, + - * / and brackets are arithmetic")


def _computes(tree: ast.expr) -> bool:
    return any(isinstance(node, ast.BinOp) for node in ast.walk(tree))


def _left_side(text: str) -> _Side | None:
    """Read the arithmetic that a text ends with; None where it is part of something else."""
    run = text[len(text.rstrip(_ARITHMETIC)) :]
    before = text[: len(text) - len(run)]
    piece = _BEFORE_NUMBER.split(run)[-1]
    if _SPACED_THOUSANDS.search(run):
        return None
    if piece == run and before:
        operator_first = run.lstrip()[:1] in ("+", "-", "*", "/") and before[-1] not in ":("
        glued = not run[:1].isspace() and _GLUED_BEFORE.search(before)
        if operator_first or glued or _WORD_OPERATOR.search(before):
            return None
    piece = piece.strip().removeprefix("**").strip()
    while piece.startswith("(") and piece.count("(") > piece.count(")"):
        piece = piece[1:].strip()
    side = _read(piece)
    counts_something = side is not None and not side.computed and before.rstrip()[-1:].isalnum()
    return None if counts_something else side


def _right_side(text: str) -> _Side | None:
    """Read the arithmetic that a text begins with; None where it goes on as something else."""
    run = text[: len(text) - len(text.lstrip(_ARITHMETIC))]
    piece = _BEFORE_OPERAND.split(run.strip())[0]
    after = text[len(run) :]
    if _SPACED_THOUSANDS.search(run) or (piece == run.strip() and _GOES_ON.match(after)):
        return None
    piece = piece.removesuffix("**").removeprefix("**").strip().removesuffix(".")
    while piece.endswith(")") and piece.count(")") > piece.count("("):
        piece = piece[:-1].strip().removesuffix(".")
    side = _read(piece)
    unknown = side is not None and side.computed and run[-1:].strip() and after[:1].isalpha()
    return None if unknown else side


def _read(piece: str) -> _Side | None:
    try:
        return _side(piece)
    except ValueError:
        return None


def _agree(left: _Side, right: _Side, exact: bool) -> bool:
    """Whether two sides are equal, a number written with decimals counting as rounded to them.

    A calculator's noise in the last of many decimals (``16.830000000000002``) is forgiven too.
    """
    if left.value is None or right.value is None:
        return False
    difference = abs(left.value - right.value)
    decimals = max(left.decimals, right.decimals)
    if exact or not (left.pointed or right.pointed):
        return difference == 0
    noise = Fraction(1, 10**12) * max(abs(left.value), abs(right.value))
    rounding = Fraction(1, 2 * 10**decimals) if decimals else Fraction(0)
    return difference <= max(rounding, noise)


def _verdicts(text: str, exact: bool) -> Iterator[bool]:
    """Yield, for every arithmetic equality in a text, whether it holds."""
    parts = _EQUALS.split(text)
    chained = False
    for left_text, right_text in pairwise(parts):
        left, right = _left_side(left_text), _right_side(right_text)
        if left is None or right is None:
            chained = False
            continue
        counted = left.computed or right.computed or chained
        if counted:
            yield _agree(left, right, exact)
        chained = counted and not right_text.strip(_ARITHMETIC)


def _normalized(text: str) -> str:
    text = _LATEX.sub(lambda sign: "/" if sign[1] == "div" else "*", text)
    text = text.translate(_SIGNS)
    text = _LETTER_TIMES.sub(r"\1*\2", text)
    text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    return _MIXED.sub(r"(\1+\2)", text)


def equations_hold(step: str, exact: bool = False) -> bool | None:
    """Return whether every arithmetic equation in a step holds; None where it has none.

    Both calculator annotations (``<<48/2=24>>``) and plain equations (``31+9=40``) count, and every
    equality of a chain: ``5*2=10+3=13`` is wrong. A percentage may be meant as a figure or as a
    share: ``20/50 = 40%`` and ``20/50*100 = 40%`` both hold. ``10/3 = 3.33`` holds as well, unless
    with `exact`.
    """
    texts = [*_ANNOTATION.findall(step), _BULLET.sub("", _ANNOTATION.sub("", step), count=1)]
    verdicts: list[bool] = []
    for text in map(_normalized, texts):
        share = list(_verdicts(_PERCENT.sub(r"(\1/100)", text), exact))
        figure = list(_verdicts(text.replace("%", ""), exact)) if "%" in text else share
        verdicts += share if all(share) and share else figure
    return all(verdicts) if verdicts else None


def step_spans(text: str, separator: str = "\n") -> list[tuple[int, int]]:
    """Return the spans of a text's steps, end to end: each holds the separator that ends it.

    A step's separator is the decision that the step is complete, so it earns the step's reward.
    Blank pieces belong to the step before them, and to the first step where none is before.
    """
    pieces = text.split(separator)
    starts, position = [], 0
    for piece in pieces:
        if piece.strip():
            starts.append(position)
        position += len(piece) + len(separator)
    starts[:1] = [0] if starts else []
    return list(zip(starts, [*starts[1:], len(text)], strict=True)) if starts else []


def steps(
    responses: list[str],
    separator: str = "\n",
    without_equation: float | None = None,
    exact: bool = False,
) -> list[list[tuple[tuple[int, int], float]]]:
    """Process reward: 1 for a step in which every arithmetic equation holds, 0 where one does not.

    A response is cut into steps at `separator`. A step without an equation gets `without_equation`,
    or no reward at all where that is None. ``equations_hold`` says what counts as an equation.
    """
    if not isinstance(separator, str) or not separator:
        raise ValueError(f"separator must be a text of at least one character, not {separator!r}")
    if not isinstance(exact, bool):
        raise ValueError(f"exact must be true or false, not {exact!r}")
    if isinstance(without_equation, bool) or not isinstance(without_equation, int | float | None):
        raise ValueError(f"without_equation must be a number or null, not {without_equation!r}")
    return [_scored(response, separator, without_equation, exact) for response in responses]


def _scored(
    response: str, separator: str, without_equation: float | None, exact: bool
) -> list[tuple[tuple[int, int], float]]:
    scored = []
    for start, end in step_spans(response, separator):
        holds = equations_hold(response[start:end], exact)
        value = without_equation if holds is None else float(holds)
        if value is not None:
            scored.append(((start, end), value))
    return scored
