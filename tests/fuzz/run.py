"""Coverage-guided fuzzing of one target: ``python -m fuzz.run files --seconds 600``.

Requires `atheris`; docs/internals/fuzzing.md has the command and the results. A finding is a file
TARGET-crash-* beside the corpus, which holds the bytes of the target's input.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["trivium", "yaml", "json", "csv", "fuzz.targets"]):
    from fuzz.targets import TARGETS

from fuzz.seeds import DICTIONARY, seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=Path("fuzzing"))
    parsed = parser.parse_args()
    folder = parsed.corpus / parsed.target
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(parsed.target)):
        (folder / f"seed-{number}").write_bytes(seed)
    dictionary = parsed.corpus / "dictionary"
    dictionary.write_text(DICTIONARY)
    arguments = [
        *(sys.argv[0], str(folder), f"-dict={dictionary}", f"-max_total_time={parsed.seconds}"),
        *(f"-artifact_prefix={parsed.corpus}/{parsed.target}-", "-max_len=4096", "-timeout=30"),
        *("-rss_limit_mb=2048", "-print_final_stats=1", "-reload=0"),
    ]
    logging.disable()
    atheris.Setup(arguments, TARGETS[parsed.target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
