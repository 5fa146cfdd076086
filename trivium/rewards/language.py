"""Reward for the language of a response, by the scripts of its words.

The rule knows scripts, not vocabularies: it tells Chinese from English, but not French from
English, or Chinese characters in a Japanese text from Chinese. It is exact, fast, and its value
moves with every word, as the language consistency reward of DeepSeek-R1 (2025, section 2.3.1).
"""

from __future__ import annotations

from functools import cache

import regex

_LANGUAGES = {
    "Latin": "af az ca cs cy da de en eo es et eu fi fr ga gl hr hu id is it la lt lv ms mt nb nl "
    "nn no pl pt ro sk sl sq sv sw tl tr uz vi",
    "Cyrillic": "be bg kk ky mk mn ru tg uk",
    "Cyrillic Latin": "sr",
    "Greek": "el",
    "Han": "zh",
    "Han Hiragana Katakana": "ja",
    "Hangul": "ko",
    "Arabic": "ar fa ps ur",
    "Hebrew": "he yi",
    "Devanagari": "hi mr ne sa",
    "Bengali": "as bn",
    "Gurmukhi": "pa",
    "Gujarati": "gu",
    "Tamil": "ta",
    "Telugu": "te",
    "Kannada": "kn",
    "Malayalam": "ml",
    "Sinhala": "si",
    "Thai": "th",
    "Lao": "lo",
    "Khmer": "km",
    "Myanmar": "my",
    "Georgian": "ka",
    "Armenian": "hy",
    "Ethiopic": "am ti",
}
SCRIPTS = {
    code: tuple(scripts.split()) for scripts, codes in _LANGUAGES.items() for code in codes.split()
}
"""Scripts of each language, by its ISO 639-1 code."""
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""Scripts written without spaces between words."""
_WORD = regex.compile(
    rf"[{_UNSPACED}]\p{{M}}*|(?:(?![{_UNSPACED}])[\p{{L}}\p{{M}}])"
    rf"(?:(?![{_UNSPACED}])[\p{{L}}\p{{M}}'’])*"
)
_FORMULA_OR_CODE = regex.compile(
    r"\$[^$\n]*\$|`[^`\n]*`|\\[a-zA-Z]+|(?<!\w)[A-Za-z]{2,10}://\S+|</?\w+>"
)
_BLOCKS = (("```", "```"), ("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)"))


def language(responses: list[str], language: str, tag: str | None = None) -> list[float]:
    """Return the share of each response's words that are in the scripts of a language.

    A word is a run of letters; in scripts without spaces between words, each character is one.
    Formulas, code, URLs and tags do not count, nor do single letters, which are variables in most
    texts. With `tag`, only the text between ``<tag>`` and ``</tag>`` counts. Without words the
    value is 0.
    """
    if language not in SCRIPTS:
        raise ValueError(
            f"language must be one of {', '.join(sorted(SCRIPTS))}, not {language!r}: write an "
            "ISO 639-1 code"
        )
    if tag is not None and (not isinstance(tag, str) or not tag):
        raise ValueError(f"tag must be a name such as think, or null, not {tag!r}")
    return [_share(_inside(response, tag), language) for response in responses]


def _inside(response: str, tag: str | None) -> str:
    if tag is None:
        return response
    _, opened, rest = response.partition(f"<{tag}>")
    content, closed, _ = rest.partition(f"</{tag}>")
    return content if opened and closed else ""


def _share(text: str, language: str) -> float:
    for opening, closing in _BLOCKS:
        text = _without(text, opening, closing)
    words = [word for word in _WORD.findall(_FORMULA_OR_CODE.sub(" ", text)) if _counts(word)]
    foreign = _foreign(SCRIPTS[language])
    own = sum(foreign.search(word) is None for word in words)
    return own / len(words) if words else 0.0


def _without(text: str, opening: str, closing: str) -> str:
    """Return the text without what is between the delimiters; linear, with or without an end."""
    kept, at = [], 0
    while (start := text.find(opening, at)) >= 0:
        end = text.find(closing, start + len(opening))
        if end < 0:
            break
        kept.append(text[at:start])
        at = end + len(closing)
    return " ".join([*kept, text[at:]])


_ANY_UNSPACED = regex.compile(rf"[{_UNSPACED}]")
_LETTER = regex.compile(r"\p{L}")


def _counts(word: str) -> bool:
    return len(_LETTER.findall(word)) > 1 or _ANY_UNSPACED.match(word) is not None


@cache
def _foreign(scripts: tuple[str, ...]) -> regex.Pattern[str]:
    """Return the pattern of a letter of another script; letters of no script are in all of them."""
    own = "".join(rf"\p{{{script}}}" for script in (*scripts, "Common", "Inherited"))
    return regex.compile(rf"(?![{own}])\p{{L}}")
