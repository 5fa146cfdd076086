r"""Final answers as texts: characters of any script, boxes, and plain notation as LaTeX.

People write −5, 5 €, 90°, 2*pi, x**2 + 1 and 1e3, and put an answer into several boxes. The
verifiers read ASCII numbers and LaTeX, so this module rewrites the text before they see it.
Responses are untrusted and long: every function here is linear in the length of its text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

CURRENCIES = "€£¥₹₽₩₪₫฿₺₴₦₱₡₲₵₸¢"
_MINUS_SIGNS = "−‐‑﹣－"
_DASH_AS_MINUS = re.compile(r"(?<![\w)\]])–(?=[0-9.])")
_MAX_PLAIN_CHARS = 200

_AMOUNT = re.compile(rf"[{CURRENCIES}] ?(?=-?[0-9.])|(?<=[0-9]) ?[{CURRENCIES}]")
_DEGREES = re.compile(r"(?<=[0-9}) ]) ?°(?: ?[CFK](?![A-Za-z]))?")
_BOX_TOKEN = re.compile(r"(?P<box>\\boxed ?\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_DELIMITED = re.compile(r"(?:\$\$?(.*?)\$\$?|\\\((.*)\\\)|\\\[(.*)\\\])", re.DOTALL)
_INLINE_MATH = re.compile(r"\$[^$]+\$")
_ANSWER_IS = re.compile(r"(?i:\banswer(?: is|:| is:))[ *_]*")
_SYMBOLS = {
    "π": r"\pi ",
    "∞": r"\infty ",
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "÷": "/",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "±": r"\pm ",
    "∪": r"\cup ",
    "∅": r"\emptyset ",
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_POWER = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_ROOT = re.compile(r"√ ?(?P<operand>[0-9]+(?:\.[0-9]+)?|[A-Za-z])")
_GREEK = frozenset("alpha beta gamma delta epsilon theta lambda mu pi sigma tau phi omega".split())
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp".split()
)
_INFINITY = frozenset(("infinity", "inf", "oo"))
_WORD_CHARS = 4
"""Letters without a sign between them are a word from this length on, and a product below it."""


class _Characters(dict[int, int | str]):
    """Table for ``str.translate`` that is filled as characters occur."""

    def __missing__(self, code: int) -> int | str:
        character = chr(code)
        digit = unicodedata.decimal(character, None)
        if digit is not None:
            self[code] = str(digit)
        elif 0xFF01 <= code <= 0xFF5E or 0x1D400 <= code <= 0x1D7FF or character in "℃℉":
            self[code] = unicodedata.normalize("NFKC", character)
        else:
            self[code] = code
        return self[code]


_characters = _Characters({ord(sign): "-" for sign in _MINUS_SIGNS})
_characters |= {ord("٫"): ".", ord("٬"): ","}


def ascii_numbers(text: str) -> str:
    """Return the text with digits and minus signs of every script, and full-width signs, in ASCII.

    ``−５`` and ``٥`` become ``-5`` and ``5``. A dash is a minus sign only before a number and after
    none: ``–5``, but not ``3–5``.
    """
    if text.isascii():
        return text
    return _DASH_AS_MINUS.sub("-", text.translate(_characters))


def _without_units(text: str) -> str:
    """Return the text without degree signs and currency signs (not ``$``) beside numbers."""
    return text if text.isascii() else _DEGREES.sub("", _AMOUNT.sub("", text))


@dataclass(frozen=True)
class _Box:
    """One ``\\boxed{content}`` from ``start`` to ``end``."""

    start: int
    end: int
    content: str


def _boxes(text: str) -> list[_Box]:
    r"""Return the outermost closed ``\boxed{…}``, in order."""
    found: list[_Box] = []
    waiting: list[tuple[int, int] | None] = []
    for token in _BOX_TOKEN.finditer(text):
        if token["box"]:
            waiting.append((token.start(), token.end()))
        elif token["open"]:
            waiting.append(None)
        elif token["close"] and waiting:
            opened = waiting.pop()
            if opened is not None:
                start, content_start = opened
                while found and found[-1].start > start:
                    found.pop()
                content = text[content_start : token.start()].strip()
                found.append(_Box(start, token.end(), content))
    return found


def last_box(text: str) -> str | None:
    r"""Return the LaTeX in the last ``\boxed{…}`` of a text, without spaces, or None."""
    boxes = _boxes(_without_units(ascii_numbers(text)))
    return "".join(to_latex(boxes[-1].content).split()) if boxes else None


def boxed_answer(answer: str) -> str:
    r"""Return a data row's answer as ``\boxed{…}`` in LaTeX; empty if it has none.

    ``answer`` is an expression (LaTeX or plain), an expression between ``$``, or a solution that
    ends in ``#### …`` or contains ``\boxed{…}``. The contents of several boxes are one set.
    """
    text = _without_units(ascii_numbers(answer))
    contents = [box.content for box in _boxes(text)]
    if not contents:
        final = text.rpartition("####")[2].strip().strip("*").strip()
        delimited = _DELIMITED.fullmatch(final)
        if delimited:
            final = next((g for g in delimited.groups() if g is not None), "").strip()
        contents = [re.sub(r"(?<!\\)[%$]", r"\\\g<0>", final)]
    distinct = dict.fromkeys(to_latex(content) for content in contents if content)
    return f"\\boxed{{{', '.join(distinct)}}}" if distinct else ""


def readable_response(response: str, gold: str) -> str:
    r"""Return a response as `math-verify` reads it best; ``gold`` is a ``boxed_answer``.

    The last box is the answer, and earlier ones are left out. If the gold answer has n parts, and
    the last box has one, the last n boxes are the answer. Without a box, a plain expression after
    "answer is" or "answer:" becomes LaTeX.
    """
    text = _without_units(ascii_numbers(response))
    boxes = _boxes(text)
    if boxes:
        parts = _parts(gold.removeprefix("\\boxed{").removesuffix("}"))
        joined = len(boxes) >= parts and _parts(boxes[-1].content) == 1
        kept = boxes[-parts:] if joined else boxes[-1:]
        return "".join(_with_one_box(text, boxes, ", ".join(to_latex(b.content) for b in kept)))
    text = text if text.isascii() else _INLINE_MATH.sub(lambda m: _symbols_to_latex(m[0]), text)
    return _plain_tail_to_latex(text)


def _with_one_box(text: str, boxes: list[_Box], content: str) -> Iterator[str]:
    """Yield the text without its boxes, and a box with this content in place of the last."""
    at = 0
    for box in boxes:
        yield text[at : box.start]
        at = box.end
    yield f"\\boxed{{{content}}}"
    yield text[at:]


def _parts(content: str) -> int:
    """Return the number of answers that commas separate, outside of brackets and of numbers."""
    depth, commas = 0, 0
    content = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))|\\[{}]", "", content)
    for character in content:
        depth += (character in "([{") - (character in ")]}")
        commas += character == "," and depth == 0
    return commas + 1


def _plain_tail_to_latex(text: str) -> str:
    """Return the text with the plain expression after its last "answer is" as ``$LaTeX$``."""
    *_, last = (None, *_ANSWER_IS.finditer(text))
    if last is None:
        return text
    tail = text[last.end() :].split("\n", 1)[0].rstrip(" .*_")
    if "$" in tail or "\\" in tail or not re.search("[A-Za-z√π∞⁰¹²³⁴⁵⁶⁷⁸⁹]", tail):
        return text  # LaTeX already, or numbers alone
    latex = _Plain(tail, words=False).latex() if len(tail) <= _MAX_PLAIN_CHARS else None
    if latex is None:
        return text
    return f"{text[: last.end()]}${latex}${text[last.end() + len(tail) :]}"


def to_latex(content: str) -> str:
    r"""Return an answer's expression as LaTeX: ``2*pi`` becomes ``2\cdot \pi``.

    Text that is LaTeX already keeps its commands, and words become ``\text{…}``.
    """
    if "\\" in content or len(content) > _MAX_PLAIN_CHARS:
        return _symbols_to_latex(content)
    if re.fullmatch(r"[A-Za-z ]+", content) and _has_words(content):
        return f"\\text{{{content}}}"
    latex = _Plain(content, words=True).latex()
    return _symbols_to_latex(content) if latex is None else latex


def _has_words(content: str) -> bool:
    names = _GREEK | _FUNCTIONS | _INFINITY
    return any(len(word) >= _WORD_CHARS and word.lower() not in names for word in content.split())


def _symbols_to_latex(text: str) -> str:
    """Return the text with mathematical symbols as LaTeX commands."""
    if text.isascii():
        return text
    text = _POWER.sub(lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _ROOT.sub(lambda m: f"\\sqrt{{{m['operand']}}}", text)
    for symbol, command in _SYMBOLS.items():
        text = text.replace(symbol, command)
    return text


class _Plain:
    """Plain notation, as in programs and messages, to LaTeX."""

    _TOKEN = re.compile(
        r"(?P<space>\s*)(?:"
        r"(?P<scientific>(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]{1,2}(?![\w.]))"
        r"|(?P<number>[0-9](?:[0-9,.]*[0-9])?|\.[0-9]+)"
        r"|(?P<name>[A-Za-z]+)|(?P<power>\*\*|\^)|(?P<sign>\S))"
    )

    def __init__(self, text: str, *, words: bool) -> None:
        self.tokens = list(self._TOKEN.finditer(_symbols_before_roots(text)))
        self.words = words
        self.at = 0

    def latex(self) -> str | None:
        """Return the LaTeX; None if the text is no plain expression."""
        try:
            return "".join(self._item() for _ in iter(self._has_more, False)).strip()
        except ValueError:
            return None

    def _has_more(self) -> bool:
        return self.at < len(self.tokens)

    def _next(self) -> re.Match[str]:
        if not self._has_more():
            raise ValueError("the expression ends too early")
        self.at += 1
        return self.tokens[self.at - 1]

    def _item(self) -> str:
        """Return the next token as LaTeX, with the operand of a power or a root."""
        token = self._next()
        space = token["space"]
        if token["scientific"]:
            return space + format(Decimal(token["scientific"]), "f")
        if token["power"]:
            return f"{space}^{{{self._operand()}}}"
        if token["name"]:
            return space + self._name(token["name"])
        if token["sign"] == "√":
            return f"{space}\\sqrt{{{self._operand()}}}"
        if token["sign"] == "*":
            return f"{space}\\cdot "
        if token["sign"] and token["sign"] not in "+-/()=,.!<>|[]{}%'":
            raise ValueError(f"{token['sign']} has no meaning in a plain expression")
        return space + (token["number"] or token["sign"])

    def _name(self, name: str) -> str:
        lower = name.lower()
        if lower == "sqrt":
            return f"\\sqrt{{{self._operand()}}}"
        if lower in _INFINITY:
            return "\\infty "
        if lower in _FUNCTIONS or lower in _GREEK:
            return f"\\{lower} "
        if len(name) > 1 and (not self.words or len(name) >= _WORD_CHARS):
            raise ValueError(f"{name} is a word")
        return name

    def _operand(self) -> str:
        """Return what a power or a root applies to: a number, a name or a group in brackets."""
        if self._has_more() and self.tokens[self.at]["sign"] in ("-", "+"):
            return self._next()["sign"] + self._operand()
        if not (self._has_more() and self.tokens[self.at]["sign"] in ("(", "{")):
            return self._item().strip()
        closing = {"(": ")", "{": "}"}[self._next()["sign"]]
        parts: list[str] = []
        while True:
            if self._has_more() and self.tokens[self.at]["sign"] == closing:
                self.at += 1
                return "".join(parts).strip()
            if self._has_more() and self.tokens[self.at]["sign"] == "(":
                parts.append(f"({self._operand()})")
            else:
                parts.append(self._item())


def _symbols_before_roots(text: str) -> str:
    """Return the text with symbols as the names and signs that plain notation has for them."""
    text = _POWER.sub(lambda m: f"^({m[0].translate(_SUPERSCRIPTS)})", text)
    for symbol, name in {"π": " pi ", "∞": " inf ", "×": "*", "·": "*", "⋅": "*", "÷": "/"}.items():
        text = text.replace(symbol, name)
    return text
