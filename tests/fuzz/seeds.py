"""Seed inputs of the fuzzing targets: one example of every tested case, and a dictionary."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

from fuzz.targets import CONFIGURATIONS, KINDS, LOADERS

from trivium.commands import COMMANDS

_LINES = [
    b'{"prompt": "2+2?", "answer": 4}\n\n{"prompt": "3?", "answer": null}\n',
    b'\xef\xbb\xbf{"a": "\\ud800", "b": [1e999, -0.0, NaN]}\r\n{"a": 1, "a": 2}\r{"c": {}}',
    b'{"a": 1}\n{"a": \n[1]\n"x"\n\xff\n{"a": "\x00"}\n',
    b'{"a": ' + b"9" * 4000 + b"}\n",
    b"[" * 3000,
]
_ARRAYS = [
    b'[{"a": 1}, {"a": "\\u00e9,\\n"},\n {"a": [true, false, null]}]',
    b"\xef\xbb\xbf [\n]\n",
    b'[{"a": 1}, {"a": 2}',
    b'[1, "x", {"a": {"a": {"a": []}}}] x',
    b'{"a": 1}\n{"a": 2}\n',
]
_TABLES = [
    b'question,answer\n2+2?,"4, or\n""four"""\n3?,3\n',
    b"\xef\xbb\xbfa,b\r\n1,2\r\n\r\n3\r\n",
    b"a,a\n1,2\n",
    b'a,"b\n',
    b"a\n\x00\n\xff\n",
    b"a\x1b[31m,b\n1\n",
]


def _files() -> Iterator[bytes]:
    for kind, ending in enumerate(KINDS):
        examples = {"jsonl": _LINES, "json": _ARRAYS, "csv": _TABLES}[ending.split(".")[1]]
        for style in (0, 4, 7):
            for content in examples:
                yield bytes([kind, style]) + content


def _parquet() -> Iterator[bytes]:
    import pyarrow as pa
    from pyarrow import parquet

    tables = [
        pa.table({"prompt": ["2+2?", "3?", None], "answer": [4, 3, 0]}),
        pa.table({"messages": [[{"role": "user", "content": "hi"}]], "x": [1.5], "b": [b"\xff"]}),
        pa.table(
            {"when": pa.array([0, 2**62], pa.timestamp("us")), "d": pa.array([1, 2], "date32")}
        ),
        pa.table({"a": pa.array(["x", "x"]).dictionary_encode()}),
    ]
    for table in tables:
        for compression in ("none", "snappy"):
            written = io.BytesIO()
            parquet.write_table(table, written, compression=compression)
            yield written.getvalue()


def _sources() -> Iterator[bytes]:
    names = "one.jsonl several several/train.jsonl several/test-0.csv empty unknown.txt loop.jsonl"
    for name in [*names.split(), "folder.jsonl", "pipe.jsonl", "ones.jsonl", "one.jsonl/x.jsonl"]:
        yield bytes([0, 0]) + b"@/" + name.encode()
        yield bytes([0, 255, 0]) + b"@/" + name.encode()
        yield bytes([255, 0, 0, 0, 0]) + b"@/" + name.encode()
    for path in (
        b"~nobody/x.jsonl",
        b"~/x.jsonl",
        b"org/name",
        b"a" * 300,
        b"a\0b.csv",
        b"\xff.csv",
    ):
        yield bytes([0, 0]) + path


def _loaders() -> Iterator[bytes]:
    for loader in range(len(LOADERS)):
        for words in (b"\x00\x04\x05", b"\xff\x04\x05\x01", b"\x10\x20\x30\xf8\x40\x50\xfa"):
            yield bytes([loader, 0]) + b"\x00" * 7 + b"\x02" + words * 40
            yield bytes([loader, 0]) + words * 40


def _configuration() -> Iterator[bytes]:
    sections = {
        "PromptsConfig": "path: x.jsonl\ntemplate: 'Q: {a}'\nmax_prompt_tokens: 3\n",
        "RewardConfig": "function: gsm8k\nweight: .5\narguments: {a: [1, null]}\n",
        "RunConfig": "directory: runs/x\nseed: 3\n",
    }
    for index, name in enumerate(c.__name__ for c in CONFIGURATIONS):
        if name in sections:
            yield bytes([index]) + sections[name].encode()
        for command in COMMANDS.values():
            if command.config.endswith(f":{name}"):
                yield bytes([index]) + command.example.encode()
                argument = command.arguments.replace(" ", "\0")
                yield bytes([index]) + f"{command.example}\0{argument}".encode()
    for odd in (
        b"a: &a [1, 1]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n",
        b"a: &a {b: *a}\n",
        b"a: " + b"[" * 2000,
        b"path: 1e999\nseed: 0x" + b"f" * 3900,
        b"? [a]\n: b\n? {a: b}\n: c\n!!python/object:os.system x: y\n",
        b'function: gsm8k\narguments: {"\\ud800": 1}\n',
        b'function: gsm8k\narguments: {a: "\\ud800"}\n\0columns."x\xff"=1\0arguments.\xff=1',
        b"path: !!binary aGk=\npath: x\n<<: {a: b}\n",
        b"%YAML 1.2\n---\npath: x\n---\npath: y\n",
        b"path: \xff\n",
        b"path: \x00",
        b"\xfe\xffp",
        b"path: |\n  x\n\ty\n",
        b"seed: 1_000\n",
        b"path: x\0path=[\0limit=nan\0columns.a=1\0columns.0.b=2\0a.b.c.d=e\0=\0path=# x",
    ):
        for index in (0, 1, 2, 7, 11):
            yield bytes([index]) + odd


def seeds(target: str) -> Iterator[bytes]:
    """Yield the seed inputs of a target."""
    seeds_by_target: dict[str, Callable[[], Iterator[bytes]]] = {
        "files": _files,
        "parquet": _parquet,
        "sources": _sources,
        "loaders": _loaders,
        "configuration": _configuration,
    }
    return seeds_by_target[target]()


_MARKS = ['"', '""', ": ", "- ", "? ", "&a ", "<<: ", "!!int ", "|\n", ">-\n", "---\n", "...\n"]
_WORDS = r"""
{ } [ ] : , \u \ud800 null true false NaN 1e999 -Infinity \n *a !!python/ %YAML %TAG ~ # '
.inf .nan 0x 1_0 @/ model path data rewards function weight template columns optimizer
learning_rate run directory seed evaluation every beta responses_per_prompt sampling
temperature critic lora rank limit split subset budget prompt completion messages role
content chosen rejected labels
"""
_BYTES = [b"\xef\xbb\xbf", b"\xff", b"\0", b"\x1f\x8b"]


def _quoted(word: bytes) -> str:
    escaped = "".join(f"\\x{byte:02x}" for byte in word)
    return f'"{escaped}"'


DICTIONARY = "".join(
    _quoted(word) + "\n"
    for word in [*_BYTES, *(text.encode() for text in (*_MARKS, *_WORDS.split()))]
)
"""Words that the fuzzer inserts, in libFuzzer's dictionary format."""
