"""Rows of every form, in files of every form, say the same to every loader."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.data_tokenizers import chatml_tokenizer
from helpers.row_forms import (
    ASK,
    END,
    EOS,
    FILES,
    READERS,
    TEMPLATE,
    TOKENIZER,
    TOOL,
    TOOLS_TEXT,
    TURN,
    call,
    read,
    says,
    write,
)

from trivium.data.prompts import PromptsConfig, read_prompts
from trivium.errors import DataError

# --- the table: form of row × form of file × method -----------------------------------------------

PLAIN = "1 + 2 = "
BOTH = "1 + 2\n\nin words"
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
SHAREGPT = [{"from": "human", "value": "1 + 2"}, {"from": "gpt", "value": "3"}]
CALLED = '<call>add{"a": 1, "b": 2}</call>' + END
ALPACA = [
    {"instruction": "1 + 2", "input": "in words", "output": "three"},
    {"instruction": "1 + 2", "input": "", "output": "3"},
]
KTO = [
    {"prompt": [ASK], "completion": "3", "label": True},
    {"prompt": [ASK], "completion": "4", "label": False},
]
CHAT = [ASK, says("3")]
OTHER_CHAT = [ASK, says("4")]
DIALOGUE = "\n\nHuman: 1 + 2\n\nAssistant:"
CALLS = [
    [says("", tool_calls=[call("weather", {"city": "Bonn"})])],
    [says("", tool_calls=[call("add", {"a": 1, "b": 2})]), {"role": "tool", "content": "3"},
     says("3")],
]  # fmt: skip
ANSWERED = f"{CALLED}\n<|im_start|>tool\n3{END}\n<|im_start|>assistant\n3{END}"

NO_PAIR = r"no pair: the columns are .*`columns: {chosen: better, rejected: worse}`"
NO_STEPS = r"no column `completions`; .*`columns: {completions: \w+}`"
NO_PROMPT = r"no column `prompt`; .*set `columns: {prompt: \w+}`"

Cells = dict[str, Any]
"""By method: what is read, or a pattern of the message that refuses the row.

Read are the prompts (grpo), or the prompts each with what is learned.
"""


def read_by_all(prompt: str, response: str = "3" + END, chosen: str | None = None) -> Cells:
    """Return what each method reads of a row of `row_for_all`."""
    return {
        "sft": [(prompt, response)],
        "dpo": [(prompt, response if chosen is None else chosen, "4" + END)],
        "grpo": [prompt],
        "steps": [(prompt, "3" + END)],
    }


def row_for_all(prompt: Any, response: Any = "3", **columns: Any) -> dict[str, Any]:
    """Return a row with the columns of every method."""
    return {"prompt": prompt, "completion": response, "chosen": response, "rejected": "4",
            "completions": ["3"], "labels": [True], **columns}  # fmt: skip


# name: rows, settings, and what each method makes of them
TABLE: dict[str, tuple[list[dict[str, Any]], dict[str, Any], Cells]] = {
    "`prompt` and `completion`": ([{"prompt": PLAIN, "completion": "3"}], {}, {
        "sft": [(PLAIN, "3" + EOS)], "dpo": NO_PAIR, "grpo": [PLAIN], "steps": NO_STEPS}),
    "`prompt` as text, with `chat: true`": ([row_for_all("1 + 2")], {"chat": True},
                                            read_by_all(TURN)),
    "`prompt` as messages": ([row_for_all([ASK])], {}, read_by_all(TURN)),
    "`messages`": ([{"messages": CHAT}], {}, {
        "sft": [(TURN, "3" + END)], "dpo": NO_PAIR, "grpo": [TURN], "steps": NO_STEPS}),
    "`text`": ([{"text": "1 + 2"}], {}, {
        "sft": [("1", " + 2" + EOS)], "dpo": NO_PAIR, "grpo": NO_PROMPT, "steps": NO_STEPS}),
    "`prompt`, `chosen` and `rejected`": (
        [{"prompt": PLAIN, "chosen": "3", "rejected": "4"}], {}, {
            "sft": r"no demonstration: .*`columns: {completion: chosen}`",
            "dpo": [(PLAIN, "3" + EOS, "4" + EOS)], "grpo": [PLAIN], "steps": NO_STEPS}),
    "`chosen` and `rejected` as whole chats": ([{"chosen": CHAT, "rejected": OTHER_CHAT}], {}, {
        "sft": r"no demonstration: .*`columns: {messages: chosen}`",
        "dpo": [(TURN, "3" + END, "4" + END)], "grpo": [TURN], "steps": NO_STEPS}),
    "`chosen` and `rejected` as whole texts": (
        [{"chosen": DIALOGUE + " 3", "rejected": DIALOGUE + " 4"}], {}, {
            "sft": r"no demonstration: .*`columns: {text: chosen}`",
            "dpo": [(DIALOGUE, " 3" + EOS, " 4" + EOS)], "grpo": [DIALOGUE], "steps": NO_STEPS}),
    "`prompt`, `completions` and `labels`": (
        [{"prompt": PLAIN, "completions": ["3", "4"], "labels": [True, False]}], {}, {
            "sft": r"no demonstration: .*`columns: {prompt: question, completion: answer}`",
            "dpo": NO_PAIR, "grpo": [PLAIN], "steps": [(PLAIN, "3\n4" + EOS)]}),
    "ShareGPT: `conversations`": ([{"conversations": SHAREGPT}], {}, {
        "sft": [(TURN, "3" + END)], "dpo": NO_PAIR, "grpo": [TURN], "steps": NO_STEPS}),
    "ShareGPT: `conversations`, `chosen` and `rejected`": (
        [{"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1],
          "rejected": {"from": "gpt", "value": "4"}}], {}, {
            "sft": r"no demonstration: .*`columns: {completion: chosen}`",
            "dpo": [(TURN, "3" + END, "4" + END)], "grpo": [TURN], "steps": NO_STEPS}),
    "Alpaca: `instruction`, `input` and `output`": (ALPACA, {}, {
        "sft": r"Alpaca.*`chat: true`.*`columns: {completion: output}`", "dpo": NO_PAIR,
        "grpo": "Alpaca.*`chat: true`", "steps": NO_STEPS}),
    "Alpaca, with `chat: true`": (ALPACA, {"chat": True}, {
        "sft": [(TURN.replace("1 + 2", BOTH), "three" + END), (TURN, "3" + END)], "dpo": NO_PAIR,
        "grpo": [TURN.replace("1 + 2", BOTH), TURN], "steps": NO_STEPS}),
    "KTO: `prompt`, `completion` and `label`": (KTO, {}, {
        "sft": [(TURN, "3" + END)], "dpo": r"KTO's data.*`chosen` \(a completion labeled true\)",
        "grpo": [TURN, TURN], "steps": NO_STEPS}),
    "messages as JSON text": (
        [row_for_all(json.dumps([ASK]), json.dumps([says("3")]))], {}, read_by_all(TURN)),
    "`content` as one part": ([
        row_for_all([{**ASK, "content": [{"type": "text", "text": "1 + 2"}]}],
                    [{**says(""), "content": [{"type": "text", "text": "3"}]}])], {},
        read_by_all(TURN)),
    "a system message in the chat": (
        [row_for_all([{"role": "system", "content": "Be brief."}, ASK], system="x")],
        {"system": "y"}, read_by_all(SYSTEM + TURN)),
    "`system`": ([row_for_all([ASK], system="Be brief.")], {"system": "y"},
                 read_by_all(SYSTEM + TURN)),
    "`tools`": ([row_for_all([ASK], tools=[TOOL])], {}, read_by_all(TOOLS_TEXT + TURN)),
    "`tools` as JSON text": ([row_for_all([ASK], tools=json.dumps([TOOL]))], {},
                             read_by_all(TOOLS_TEXT + TURN)),
    "`tools`, each as JSON text": ([row_for_all([ASK], tools=[json.dumps(TOOL)])], {},
                                   read_by_all(TOOLS_TEXT + TURN)),
    "`tool_calls`": ([row_for_all([ASK], c) for c in CALLS], {}, {
        "sft": [(TURN, f'<call>weather{{"city": "Bonn"}}</call>{END}'), (TURN, CALLED + "3" + END)],
        "dpo": [(TURN, f'<call>weather{{"city": "Bonn"}}</call>{END}', "4" + END),
                (TURN, ANSWERED, "4" + END)],
        "grpo": [TURN, TURN], "steps": [(TURN, "3" + END)] * 2}),
    "`arguments` as JSON text, which keep a null": (
        [row_for_all([ASK], [says("", tool_calls=[call("add", '{"a": 1, "b": null}')])])], {},
        read_by_all(TURN, '<call>add{"a": 1, "b": null}</call>' + END)),
    "`reasoning_content` or `thinking`": (
        [row_for_all([ASK], [says("3", thinking="so")])], {},
        read_by_all(TURN, "<think>so</think>3" + END)),
    "`weight: 0` on a turn": (
        [row_for_all([ASK], [says("4", weight=0), ASK, says("3", weight=1)])], {},
        read_by_all(TURN, "3" + END, chosen=f"4{END}\n{TURN}3{END}")),
    "an end token in a text": (
        [row_for_all([ASK], [says("a <|im_end|> b"), ASK, says("3")])], {},
        read_by_all(TURN, f"a {END} b{END}3{END}", chosen=f"a {END} b{END}\n{TURN}3{END}")),
}  # fmt: skip


@pytest.mark.parametrize("form", FILES)
@pytest.mark.parametrize("method", READERS)
@pytest.mark.parametrize("name", TABLE)
def test_row_means_the_same_in_every_form_of_file_or_is_refused_with_what_to_write(
    tmp_path: Path, name: str, method: str, form: str
) -> None:
    rows, settings, cells = TABLE[name]
    path, expected = write(tmp_path, form, rows), cells[method]
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            read(path, method, **settings)
    else:
        assert read(path, method, **settings)[0] == expected


def test_documented_table_is_this_one() -> None:
    page = Path(__file__).resolve().parents[2] / "docs/row-forms.md"
    lines = re.findall(r"^\| (.+?) \|$", page.read_text("utf-8"), re.MULTILINE)
    documented = {name: cells for name, *cells in (line.split(" | ") for line in lines[1:])}
    assert list(documented) == list(TABLE)
    for name, (_, _, cells) in TABLE.items():
        refused = [cell.startswith("refused") for cell in documented[name]]
        assert refused == [isinstance(cells[method], str) for method in READERS], name


def test_column_of_system_messages_goes_before_the_configured_one(tmp_path: Path) -> None:
    rows = [{"prompt": [ASK], "system": text} for text in ("Be brief.", None)]
    prompts, _ = read(write(tmp_path, "jsonl", rows), "grpo", system="Be long.")
    assert prompts == [SYSTEM + TURN, SYSTEM.replace("brief", "long") + TURN]


def test_column_of_tools_may_have_another_name(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", [{"messages": CHAT, "functions": [TOOL]}])
    assert read(path, "grpo", columns={"tools": "functions"})[0] == [TOOLS_TEXT + TURN]


def test_row_without_tools_beside_rows_with_tools_has_none(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", [{"messages": CHAT, "tools": t} for t in ([TOOL], None)])
    assert read(path, "sft")[0] == [(TOOLS_TEXT + TURN, "3" + END), (TURN, "3" + END)]


def test_sharegpt_calls_and_observations_are_tool_calls_and_results(tmp_path: Path) -> None:
    called = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'}
    chat = [SHAREGPT[0], called, {"from": "observation", "value": "3"}, SHAREGPT[1]]
    path = write(tmp_path, "jsonl", [{"conversations": chat, "tools": json.dumps([TOOL])}])
    assert read(path, "sft")[0] == [(TOOLS_TEXT + TURN, CALLED + "3" + END)]


def test_chats_in_the_text_of_csv_are_read_and_noted(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,tools\n"' + json.dumps([ASK]).replace('"', '""') + '","'
                    + json.dumps([TOOL]).replace('"', '""') + '"\n')  # fmt: skip
    texts, report = read(str(path), "grpo")
    assert texts == [TOOLS_TEXT + TURN]
    assert list(report.notes) == [
        "`prompt` is JSON text of messages, and is read as these messages"
    ]


def test_tools_reach_rewards_as_the_template_sees_them(tmp_path: Path) -> None:
    rows = [{"prompt": [ASK], "tools": json.dumps(tools)} for tools in ([TOOL], [])]
    prompts, _ = read_prompts(PromptsConfig(path=write(tmp_path, "jsonl", rows)), TOKENIZER)
    assert [prompt.columns for prompt in prompts] == [{"tools": [TOOL]}, {"tools": None}]


def test_template_that_takes_arguments_only_as_text_gets_json(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", [{"prompt": [ASK], "completion": CALLS[0]}])
    for written in ("+ c.function.arguments +", "~ c.function.arguments ~"):
        template = TEMPLATE.replace("+ c.function.arguments | tojson +", written)
        texts, report = read(path, "sft", chatml_tokenizer(template))
        assert texts == [(TURN, '<call>weather{"city": "Bonn"}</call>' + END)]
        assert not report.notes


@pytest.mark.parametrize("name", ["`tools`", "`tool_calls`", "`reasoning_content` or `thinking`"])
def test_chat_that_is_learned_as_it_is_has_no_remark(tmp_path: Path, name: str) -> None:
    rows, settings, _ = TABLE[name]
    for method in READERS:
        notes = read(write(tmp_path, "jsonl", rows), method, **settings)[1].notes
        assert {*notes} <= {"the same as an earlier row"}
