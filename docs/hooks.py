"""Hooks of the docs build: pages that are generated from the code, and a check of the result.

The configuration reference comes from the configuration classes and the API reference from the
docstrings, so neither can differ from the code. After the build every page is checked for
resources that a browser would fetch from the network.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

REPOSITORY = Path(__file__).resolve().parents[1]
API = (
    "maths algorithms training models rollout rewards data evaluation monitoring runs config"
).split()
"""Packages with a page in the API reference."""
FIELD = re.compile(
    r"(?P<name>\S+): (?P<kind>.*?)(?:, (?P<required>required)|, default (?P<value>.*))?"
)
FETCHED = re.compile(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//[^"]*"')
SHIM = re.compile(r'<script src="https://unpkg.com/iframe-worker/shim"></script>')
LINKED = re.compile(r'<link\b[^>]*\brel="(?:stylesheet|preconnect|icon)"[^>]*>')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    sys.path.insert(0, str(REPOSITORY))
    from trivium.commands import COMMANDS

    pages = {"configuration/index.md": configuration_index(), "api/index.md": api_index()}
    for name in COMMANDS:
        pages[f"configuration/{name}.md"] = configuration_page(name)
    for package in API:
        pages[f"api/{package}.md"] = api_page(package)
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace ``{{ figures NAME }}`` with the table of a recipe's figures beside the paper's."""
    return re.sub(r"\{\{ figures (\S+) \}\}", lambda match: recipe_figures(match[1]), markdown)


def recipe_figures(name: str) -> str:
    """Return the marked settings of a recipe: the paper's, the scaled ones, and our own."""
    from trivium.config.yaml_source import format_value
    from trivium.pipelines.recipes import figures, recipe_path

    rows, ours = ["| setting | here | paper |", "|---|---|---|"], []
    for figure in figures(recipe_path(name)):
        value = f"`{_cell(format_value(figure.value))}`"
        if figure.kind == "ours":
            note = f" ({figure.note})" if figure.note else ""
            ours.append(f"`{figure.name}: {format_value(figure.value)}`{note}")
        else:
            theirs = "the same" if figure.kind == "paper" else figure.note
            remark = f"; {figure.note}" if figure.kind == "paper" and figure.note else ""
            rows.append(f"| `{figure.name}` | {value} | {theirs}{remark} |")
    return "\n".join([*rows, "", f"Ours, because the paper has none: {', '.join(ours)}."])


def on_post_page(output: str, **_: object) -> str:
    """Replace the one script that the theme takes from the network with our own."""
    return _without_network(output)


def on_post_template(output_content: str, **_: object) -> str:
    """Do the same for pages that are made from a template alone."""
    return _without_network(output_content)


def _without_network(page: str) -> str:
    script = Path(__file__).with_name("search-from-disk.js").read_text(encoding="utf-8")
    return SHIM.sub(lambda _: f"<script>\n{script}</script>", page)


def on_post_build(config: MkDocsConfig) -> None:
    """Raise if a page would fetch a script, picture, font or style sheet from the network."""
    from mkdocs.exceptions import PluginError

    for page in Path(config.site_dir).rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        found = FETCHED.findall(text)
        found += [link for link in LINKED.findall(text) if re.search(r'href="(?:https?:)?//', link)]
        if found:
            raise PluginError(f"{page}: a page must not need the network, and it has {found[0]}")


# --- configuration --------------------------------------------------------------------------------


def configuration_index() -> str:
    """Return the overview of all commands with a configuration file."""
    from trivium.commands import COMMANDS

    rows = [
        f"| [`trivium {name}`]({name}.md) | {command.help} |" for name, command in COMMANDS.items()
    ]
    return "\n".join(
        [
            "# Configuration",
            "",
            "A command reads one YAML file. Arguments after it override single keys: "
            "`trivium grpo grpo.yaml beta=0.02 rewards.0.weight=2`. An unknown key, a wrong type "
            "or a value out of bounds is an error that names the file and line, before anything "
            "is loaded. `trivium COMMAND --fields` prints these tables in a terminal.",
            "",
            "These pages are generated from the configuration classes.",
            "",
            "| command | purpose |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def configuration_page(name: str) -> str:
    """Return a command's configuration reference: an example, then one table per section."""
    from trivium.commands import COMMANDS

    command = COMMANDS[name]
    sections = _sections(command.config_class())
    lines = [
        f"# trivium {name}",
        "",
        f"{command.help[0].upper()}{command.help[1:]}.",
        "",
        f'```yaml title="{name}.yaml"',
        command.example.rstrip(),
        "```",
        "",
        "```sh",
        f"trivium {name} {name}.yaml {command.arguments}",
        "```",
        "",
    ]
    for section, (purpose, rows) in sections.items():
        lines += [f"## {section}", ""]
        lines += [purpose, ""] if purpose else []
        lines += ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _sections(config_class: type) -> dict[str, tuple[str, list[str]]]:
    """Return each section's sentence and table rows; keys without a section come first."""
    from trivium.config.field_reference import describe

    found: dict[str, tuple[str, list[str]]] = {"Top level": ("", [])}
    rows: dict[str, list[str]] = defaultdict(list)
    purposes: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", describe(config_class)):
        head, _, sentence = entry.partition("\n")
        field = FIELD.fullmatch(head)
        assert field is not None, f"{head!r} is not a field"
        top, dot, _ = field["name"].partition(".")
        sentence = " ".join(sentence.split())
        if not dot and "section" in field["kind"]:
            purposes[top] = sentence + (" Required." if field["required"] else "")
            continue
        default = f"`{field['value']}`" if field["value"] else ""
        default = "required" if field["required"] else default
        row = f"| `{field['name']}` | `{field['kind']}` | {default} | {_cell(sentence)} |"
        rows[top if dot else "Top level"].append(row)
    for section, listed in rows.items():
        found[section] = (purposes.get(section, ""), listed)
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


# --- API ------------------------------------------------------------------------------------------


def api_index() -> str:
    """Return the names that ``import trivium`` offers, by the module that defines them."""
    trivium = importlib.import_module("trivium")
    lines = [
        "# API",
        "",
        "Each command is one call of its configuration:",
        "",
        "```python",
        "import trivium",
        "",
        "config = trivium.GRPOConfig(",
        '    model={"path": "your/checkpoint"},',
        '    data={"path": "train.jsonl"},',
        '    rewards=[{"function": "reward.py:exact"}],',
        ")",
        "directory = trivium.grpo(config)",
        "```",
        "",
        "The equations alone: `from trivium.maths import gae, group_advantages, clipped_surrogate, "
        "dpo_loss`.",
        "",
        "`import trivium` gives these names, and imports nothing heavy before a name is used:",
        "",
    ]
    lines += [", ".join(f"`{name}`" for name in trivium.__all__) + ".", ""]
    lines += ["The pages of this section are generated from the docstrings, one per package:", ""]
    lines += [f"- [`trivium.{package}`]({package}.md): {_purpose(package)}" for package in API]
    return "\n".join([*lines, ""])


def api_page(package: str) -> str:
    """Return a package's page: its docstring, and every module with its public names."""
    root = REPOSITORY / "trivium" / package
    modules = sorted(path.stem for path in root.glob("*.py") if not path.stem.startswith("_"))
    lines = [f"# trivium.{package}", "", _purpose(package), ""]
    for module in modules:
        lines += [
            f"## {module}",
            "",
            f"::: trivium.{package}.{module}",
            "    options:",
            "      show_root_heading: false",
            "      show_root_toc_entry: false",
            "",
        ]
    return "\n".join(lines)


def _purpose(package: str) -> str:
    """Return the first sentence of a package's docstring."""
    import ast

    source = (REPOSITORY / "trivium" / package / "__init__.py").read_text(encoding="utf-8")
    return " ".join((ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].split())
