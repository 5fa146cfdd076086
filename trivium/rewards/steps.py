"""Step verifier: a process reward for correct arithmetic in each reasoning step.

It checks arithmetic, not reasoning: a step that correctly computes the wrong quantity counts as
correct. Equations with unknowns, words or units between the numbers cannot be parsed and are
ignored. Nothing is evaluated as code: the sides of an equation are parsed to a syntax tree that may
contain only numbers, ``+ - * /`` and parentheses.
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
_MAX_SIDE_CHARS = 200
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
_ATTACHED_BEFORE = re.compile(r"(?:[\w^}!]|\d[:,])\Z")
_CONTINUES_AFTER = re.compile(r"\s*\^|[:,]\d|\s*and\s+\(?\d+/|[a-zA-Z]\w*\s*[-+*/]")
_LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")


class _Side(NamedTuple):
    """One side of an equation: its value, None if undefined (1/0), and its notation."""

    value: Fraction | None
    decimals: int  # digits after the point of a plain number; 0 for anything else
    has_point: bool  # whether it contains a decimal point
    has_operation: bool  # whether it contains an operation


def evaluate(expression: str) -> Fraction:
    """Return the exact value of an expression of numbers, ``+ - * /`` and parentheses.

    Raises ValueError for anything else and for a division by zero.
    """
    value = _side(expression).value
    if value is None:
        raise ValueError(f"{expression!r:.80} divides by zero")
    return value


def _side(expression: str) -> _Side:
    if len(expression) > _MAX_SIDE_CHARS or not set(expression) <= set(_ARITHMETIC):
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
    return _Side(value, len(plain[1]) if plain else 0, "." in source, _has_operation(tree))


def _value(node: ast.expr, source: str) -> Fraction:
    if isinstance(node, ast.Constant):
        # Use the written digits, not the float that Python parsed from them.
        return Fraction(source[node.col_offset : node.end_col_offset])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, source)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        apply = _OPERATORS[type(node.op)]
        return apply(_value(node.left, source), _value(node.right, source))
    raise ValueError("arithmetic may contain only numbers, + - * / and parentheses")


def _has_operation(tree: ast.expr) -> bool:
    return any(isinstance(node, ast.BinOp) for node in ast.walk(tree))


def _left_side(text: str) -> _Side | None:
    """Parse the arithmetic at the end of a text; return None if it is part of something else."""
    arithmetic = text[len(text.rstrip(_ARITHMETIC)) :]
    before = text[: len(text) - len(arithmetic)]
    piece = _BEFORE_NUMBER.split(arithmetic)[-1]
    if _SPACED_THOUSANDS.search(arithmetic):
        return None
    if piece == arithmetic and before:
        operator_first = arithmetic.lstrip()[:1] in ("+", "-", "*", "/") and before[-1] not in ":("
        attached = not arithmetic[:1].isspace() and _ATTACHED_BEFORE.search(before)
        if operator_first or attached or _WORD_OPERATOR.search(before):
            return None
    piece = piece.strip().removeprefix("**").strip()
    while piece.startswith("(") and piece.count("(") > piece.count(")"):
        piece = piece[1:].strip()
    side = _read(piece)
    counts_items = side is not None and not side.has_operation and before.rstrip()[-1:].isalnum()
    return None if counts_items else side


def _right_side(text: str) -> _Side | None:
    """Parse the arithmetic at the start of a text; return None if it is part of something else."""
    arithmetic = text[: len(text) - len(text.lstrip(_ARITHMETIC))]
    piece = _BEFORE_OPERAND.split(arithmetic.strip())[0]
    after = text[len(arithmetic) :]
    continues = piece == arithmetic.strip() and _CONTINUES_AFTER.match(after)
    if _SPACED_THOUSANDS.search(arithmetic) or continues:
        return None
    piece = piece.removesuffix("**").removeprefix("**").strip().removesuffix(".")
    while piece.endswith(")") and piece.count(")") > piece.count("("):
        piece = piece[:-1].strip().removesuffix(".")
    side = _read(piece)
    touches_letter = arithmetic[-1:].strip() and after[:1].isalpha()
    has_unknown = side is not None and side.has_operation and touches_letter
    return None if has_unknown else side


def _read(piece: str) -> _Side | None:
    try:
        return _side(piece)
    except ValueError:
        return None


def _sides_equal(left: _Side, right: _Side, exact: bool) -> bool:
    """Return whether two sides are equal; a number with decimals counts as rounded.

    Floating-point noise in the last of many decimals (``16.830000000000002``) is accepted.
    """
    if left.value is None or right.value is None:
        return False
    difference = abs(left.value - right.value)
    decimals = max(left.decimals, right.decimals)
    if exact or not (left.has_point or right.has_point):
        return difference == 0
    noise = Fraction(1, 10**12) * max(abs(left.value), abs(right.value))
    rounding = Fraction(1, 2 * 10**decimals) if decimals else Fraction(0)
    return difference <= max(rounding, noise)


def _equations_hold(text: str, exact: bool) -> Iterator[bool]:
    """Yield whether each arithmetic equality in a text holds."""
    parts = _EQUALS.split(text)
    chained = False
    for left_text, right_text in pairwise(parts):
        left, right = _left_side(left_text), _right_side(right_text)
        if left is None or right is None:
            chained = False
            continue
        is_equation = left.has_operation or right.has_operation or chained
        if is_equation:
            yield _sides_equal(left, right, exact)
        chained = is_equation and not right_text.strip(_ARITHMETIC)


def _normalized(text: str) -> str:
    text = _LATEX.sub(lambda sign: "/" if sign[1] == "div" else "*", text)
    text = text.translate(_SIGNS)
    text = _LETTER_TIMES.sub(r"\1*\2", text)
    text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    return _MIXED.sub(r"(\1+\2)", text)


def equations_hold(step: str, exact: bool = False) -> bool | None:
    """Return whether every arithmetic equation in a step holds, or None without one.

    Calculator annotations (``<<48/2=24>>``), plain equations (``31+9=40``) and every equality of a
    chain count: ``5*2=10+3=13`` is wrong. A percentage may be a number or a fraction: both
    ``20/50 = 40%`` and ``20/50*100 = 40%`` hold. ``10/3 = 3.33`` also holds, except with `exact`.
    """
    texts = [*_ANNOTATION.findall(step), _BULLET.sub("", _ANNOTATION.sub("", step), count=1)]
    verdicts: list[bool] = []
    for text in map(_normalized, texts):
        as_fraction = list(_equations_hold(_PERCENT.sub(r"(\1/100)", text), exact))
        as_number = (
            list(_equations_hold(text.replace("%", ""), exact)) if "%" in text else as_fraction
        )
        verdicts += as_fraction if all(as_fraction) and as_fraction else as_number
    return all(verdicts) if verdicts else None


def step_spans(text: str, separator: str = "\n") -> list[tuple[int, int]]:
    """Return contiguous spans of a text's steps; each span includes the separator that ends it.

    The separator completes a step, so it gets the step's reward. Blank pieces belong to the
    previous step, or to the first step if there is no previous one.
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
    """Return 1 for each step whose arithmetic equations all hold, and 0 for other steps.

    `separator` splits a response into steps. A step without an equation gets `without_equation`, or
    no reward if that is None. ``equations_hold`` defines what counts as an equation.
    """
    if not isinstance(separator, str) or not separator:
        raise ValueError(f"separator must be a text of at least one character, not {separator!r}")
    if not isinstance(exact, bool):
        raise ValueError(f"exact must be true or false, not {exact!r}")
    if isinstance(without_equation, bool) or not isinstance(without_equation, int | float | None):
        raise ValueError(f"without_equation must be a number or null, not {without_equation!r}")
    return [_score_steps(response, separator, without_equation, exact) for response in responses]


def _score_steps(
    response: str, separator: str, without_equation: float | None, exact: bool
) -> list[tuple[tuple[int, int], float]]:
    scored = []
    for start, end in step_spans(response, separator):
        holds = equations_hold(response[start:end], exact)
        value = without_equation if holds is None else float(holds)
        if value is not None:
            scored.append(((start, end), value))
    return scored
