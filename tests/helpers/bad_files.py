"""Bad inputs whose fault is in a data file, a checkpoint, an output or a run's directory.

The table goes on here; see ``bad_inputs``.
"""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

from helpers.bad_inputs import bad
from helpers.tiny_models import letters_tokenizer

CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'

# Rows of a table, two or three lines each, are easier to compare than one text to a line.
# fmt: off

# --- Data files -----------------------------------------------------------------------------------


def bad_data(
    name: str, command: str, content: str | bytes, *texts: str, file: str = "", options: str = ""
) -> None:
    """Add a case whose data file holds `content`."""
    file = file or {"sft": "demos.jsonl", "dpo": "pairs.jsonl"}.get(command, "prompts.jsonl")
    yaml = f"data: {{path: {file}{options}}}\n"
    bad(name, command, yaml, *texts, files={file: content})


bad("no such data", "sft", "data: {path: demo.jsonl}\n", "demo.jsonl", "demo.jsonl:",
    "there is no such file", "did you mean demos.jsonl?")
bad("a directory of several files", "sft", "data: {path: .}\n", "demos.jsonl", ".:",
    "is a directory that holds", "set `split`")
bad("a split that is not there", "sft", "data: {path: ., split: trian}\n", "trian", ".:",
    "no file there is named trian.*", "it holds")
bad("a split of a file", "sft", "data: {path: demos.jsonl, split: train}\n", "train",
    "demos.jsonl:", "picks nothing", "remove it")
bad("a subset of a file", "sft", "data: {path: demos.jsonl, subset: main}\n", "main",
    "demos.jsonl:", "is for hub datasets", "remove it")
bad_data("a format that is none", "sft", "x", "demos.txt", "demos.txt:", "its format is unknown",
    "rename or convert it", file="demos.txt")
bad_data("an empty file", "grpo", "", "no rows", "prompts.jsonl:", "holds no rows",
    "write at least one")
bad_data("blank lines", "grpo", "\n \n", "no rows", "prompts.jsonl:", "holds no rows",
    "write at least one")
bad_data("broken JSON", "grpo", '{"prompt": "a"}\n\n{"prompt": b}\n', "column 12",
    "prompts.jsonl:3", "not valid JSON", "Expecting value")
bad_data("a line that is cut off", "grpo", '{"prompt": "a"}\n{"prompt": "b', "column",
    "prompts.jsonl:2", "not valid JSON", "Unterminated string")
bad_data("a row that is a list", "grpo", '["a"]\n', "['a']", "prompts.jsonl:1", "not a row",
    "write an object")
bad_data("a row that is null", "grpo", '{"prompt": "a"}\nnull\n', "None", "prompts.jsonl:2",
    "not a row", "write an object")
bad_data("a number for a prompt", "grpo", '{"prompt": 3}\n', "3", "prompts.jsonl:1", "not messages",
    "write a list such as")
bad_data("a prompt that is null", "grpo", '{"prompt": null}\n', "`prompt`", "prompts.jsonl:1",
    "is null", "give it a value or remove the row")
bad_data("a column of another name", "grpo", '{"promt": "a"}\n', "promt", "prompts.jsonl:1",
    "no column `prompt`", "columns: {prompt: promt}")
bad_data("another encoding", "grpo", b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "0xe9",
    "prompts.jsonl:2", "is not UTF-8", "save the file as UTF-8")
bad_data("half a character", "grpo", '{"prompt": "\\ud83d"}\n', "character 0", "prompts.jsonl:1",
    "half of a surrogate pair", "repair the escape")
bad_data("CSV among JSON lines", "grpo", '{"prompt": "a"}\nprompt,answer\n', "column 1",
    "prompts.jsonl:2", "not valid JSON", "Expecting value")
bad_data("a CSV row too long", "grpo", "prompt,answer\na,b,c\n", "3 fields", "prompts.csv:2",
    "where the first line names 2", "in double quotes", file="prompts.csv")
bad_data("a CSV column twice", "grpo", "prompt,prompt\na,b\n", "`prompt`", "prompts.csv:1",
    "is there twice", "rename one", file="prompts.csv")
bad_data("an open quote in CSV", "grpo", 'prompt\n"a\n', "CSV", "prompts.csv:", "not valid CSV",
    "check its quotes", file="prompts.csv")
bad_data("an array that breaks off", "grpo", '[{"prompt": "a"},\n {"prompt"', "prompts.json",
    "prompts.json:2", "not valid JSON", "delimiter", file="prompts.json")
bad_data("an archive that is cut off", "grpo", gzip.compress(b'{"prompt": "a"}\n' * 99)[:30],
    "prompts.jsonl.gz", "prompts.jsonl.gz:", "cannot be read to its end", "ended before",
    file="prompts.jsonl.gz")
bad_data("an archive that is none", "grpo", b"PK\x03\x04 not gzip", "prompts.jsonl.gz",
    "prompts.jsonl.gz:", "cannot be read to its end", "Not a gzipped file", file="prompts.jsonl.gz")
bad_data("a Parquet file that is none", "grpo", b"PAR1 and no more", "prompts.parquet",
    "prompts.parquet:", "not a readable Parquet file", "Parquet", file="prompts.parquet")
bad_data("a source that no row has", "grpo", '{"question": "a"}\n', "`qestion`", "prompts.jsonl:1",
    "which `columns` names for prompt", "did you mean `question`?",
    options=", columns: {prompt: qestion}")
bad_data("a template's unknown column", "grpo", '{"question": "a"}\n', "{qestion}",
    "prompts.jsonl:1", "`template` names", "did you mean {question}?",
    options=", template: '{qestion}'")
bad_data("a template of a list", "grpo", '{"question": ["a"]}\n', "['a']", "prompts.jsonl:1",
    "`template` names {question}", "it takes text or numbers", options=", template: '{question}'")
bad_data("a system message for text", "grpo", '{"prompt": "a"}\n', "plain text", "prompts.jsonl:1",
    "no place for `system`", "set `chat: true`", options=", system: be kind")
bad_data("a chat that the assistant ends", "grpo",
    '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    "column `prompt`", "prompts.jsonl:1", "ends with the assistant's turn", "end it with another's")
bad_data("a message without a role", "grpo", '{"prompt": [{"content": "a"}]}\n', "content",
    "prompts.jsonl:1", "has no `role`", "Write `role` and `content`")
bad_data("all faulty rows at once", "grpo", '{"prompt": 3}\n{"prompt": "a"}\n{"prompt": null}\n',
    "3", "prompts.jsonl:3", "not messages", "give it a value or remove the row")
bad_data("a thousand faulty rows", "grpo", '{"prompt": null}\n' * 1000, "10 faulty rows",
    "prompts.jsonl:10", "reading stopped", "give it a value or remove the row")
bad_data("a demonstration without response", "sft", '{"prompt": "a"}\n', "prompt", "demos.jsonl:1",
    "no demonstration", "name them, as in `columns:")
bad_data("a response that is a number", "sft", '{"prompt": "a", "completion": 3}\n', "3",
    "demos.jsonl:1", "not messages", "write a list such as")
bad_data("responses that are empty", "sft", '{"prompt": "a", "completion": " "}\n' * 2,
    "2 dropped: empty response", "demos.jsonl:", "nothing is left", "give rows")
bad_data("a chat without the assistant", "sft",
    '{"messages": [{"role": "user", "content": "a"}]}\n', "column `messages`", "demos.jsonl:1",
    "no assistant's turn", "a demonstration needs one")
bad_data("messages after plain text", "sft",
    '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}\n',
    "`completion` is messages", "demos.jsonl:1", "the prompt is plain text", "set `chat: true`")
bad_data("text that should be a chat", "sft", '{"text": "a"}\n', "column `text`", "demos.jsonl:1",
    "is no chat", "remove `chat`", options=", chat: true")
bad_data("a pair without the rejected", "dpo", '{"prompt": "a", "chosen": "b"}\n', "`rejected`",
    "pairs.jsonl:1", "no column", "columns: {rejected:")
bad_data("pairs that are equal", "dpo", '{"prompt": "a", "chosen": "b", "rejected": "b"}\n',
    "1 dropped: chosen equals rejected", "pairs.jsonl:", "nothing is left", "give rows")
bad_data("pairs that are empty", "dpo", '{"prompt": "a", "chosen": "", "rejected": "b"}\n',
    "1 dropped: empty response", "pairs.jsonl:", "nothing is left", "give rows")
bad_data("a pair without a prompt", "dpo", '{"chosen": "x y", "rejected": "z y"}\n', "`prompt`",
    "pairs.jsonl:1", "do not begin with a word in common", "name the prompt's column")
bad_data("chats that share nothing", "dpo",
    '{"chosen": [{"role": "user", "content": "a"}], "rejected": '
    '[{"role": "user", "content": "b"}]}\n',
    "`chosen`", "pairs.jsonl:1", "share no first message", "name the prompt's column")
bad_data("pairs of two kinds", "dpo", '{"prompt": "a", "chosen": "b", "rejected": 3}\n', "3",
    "pairs.jsonl:1", "not messages", "write a list such as")
bad_data("dialogues and a template", "dpo",
    '{"chosen": [{"role": "user", "content": "a"}], "rejected": '
    '[{"role": "user", "content": "a"}]}\n',
    "`template`", "pairs.jsonl:1", "are whole dialogues", "remove `template`",
    options=", template: x")

_STEPS = "steps: {path: steps.jsonl}\n"


def bad_steps(name: str, row: str, *texts: str) -> None:
    bad(name, "reward-model", _STEPS, *texts, files={"steps.jsonl": row}, without=("pairs",))


bad_steps("steps that are text", '{"prompt": "a", "completions": "b", "labels": [1]}\n', "'b'",
    "steps.jsonl:1", "column `completions`", "it takes a list of texts")
bad_steps("a step without a label", '{"prompt": "a", "completions": ["b", "c"], "labels": [1]}\n',
    "2 `completions` and 1 `labels`", "steps.jsonl:1", "has 2", "each step needs one")
bad_steps("a label beyond 1", '{"prompt": "a", "completions": ["b"], "labels": [2]}\n', "2",
    "steps.jsonl:1", "label 1", "a number in [0, 1]")
bad_steps("a label that is text", '{"prompt": "a", "completions": ["b"], "labels": ["+"]}\n', "'+'",
    "steps.jsonl:1", "label 1", "a number in [0, 1]")
bad_steps("an empty step", '{"prompt": "a", "completions": ["b", ""], "labels": [1, 0]}\n',
    "step 2", "steps.jsonl:1", "is empty", "remove it and its label")

bad("held-out prompts that are broken", "grpo", "evaluation: {data: {path: held_out.jsonl}}\n",
    "column 2", "held_out.jsonl:1", "not valid JSON", "Expecting property name",
    files={"held_out.jsonl": "{prompt}\n"})
bad("validation that is not there", "sft", "validation: {path: held.jsonl}\n", "held.jsonl",
    "held.jsonl:", "there is no such file", "held_out.jsonl?")
bad("texts of the mix that are broken", "ppo", "pretraining: {data: {path: demos.jsonl}}\n", "2",
    "demos.jsonl:1", "not messages", "write a list such as",
    files={"demos.jsonl": '{"prompt": "a", "completion": 2}\n'})
_CANDIDATES = "data: {path: candidates.jsonl}\ncandidates: [{response: %s, score: %s}]\n"
_NO_MODEL = ("model", "rewards", "sampling")
bad("a candidate's field that is not there", "pairs", _CANDIDATES % ("text", "scores"), "`text`",
    "candidates.jsonl:1", "there is no", "did you mean `texts`?", without=_NO_MODEL)
bad("a score that is text", "pairs", _CANDIDATES % ("texts", "texts"), "'c'", "candidates.jsonl:1",
    "`texts` is", "a score must be true, false or a finite number", without=_NO_MODEL)
bad("scores that are too few", "pairs", _CANDIDATES % ("texts", "scores"), "2 responses",
    "candidates.jsonl:1", "1 scores", "each response needs one", without=_NO_MODEL,
    files={"candidates.jsonl": '{"prompt": "a", "texts": ["c", "d"], "scores": [1]}\n'})

# --- Data that does not suit the model ------------------------------------------------------------

bad("a prompt beyond its limit", "grpo", "data: {path: prompts.jsonl, max_prompt_tokens: 1}\n",
    "2 tokens", "prompts.jsonl:1", "`max_prompt_tokens` is 1", "set `long_prompts: drop`",
    early=False)
bad("a response beyond its limit", "sft", "data: {path: demos.jsonl, max_response_tokens: 1}\n",
    "2 tokens", "demos.jsonl:1", "`max_response_tokens` is 1", "set `long_responses`", early=False)
_LONG = "ab" * 40
bad("a prompt beyond the context", "grpo", "", "80 tokens", "prompts.jsonl:1", "has room for 56",
    "set `max_prompt_tokens` and `long_prompts: drop`", early=False,
    files={"prompts.jsonl": json.dumps({"prompt": _LONG}) + "\n"})
bad("a demonstration beyond the context", "sft", "", "83 tokens", "demos.jsonl:1",
    "the model's context holds 64", "`long_responses: drop` or `truncate`", early=False,
    files={"demos.jsonl": json.dumps({"prompt": "ab", "completion": _LONG}) + "\n"})
bad("a pair beyond the context", "dpo", "", "82 tokens", "pairs.jsonl:1",
    "the model's context holds 64", "`long_responses: drop`", early=False,
    files={"pairs.jsonl": json.dumps({"prompt": "a", "chosen": _LONG, "rejected": "b"}) + "\n"})
bad("messages without a chat template", "sft", "", "chat template", "tokenizer of model",
    "the data holds messages", "use a chat model", early=False,
    files={"demos.jsonl": CHAT})
bad("columns that would be written over", "sample", "", "response", "the data has the columns",
    "uses for the response", "rename them in the data", early=False,
    files={"prompts.jsonl": '{"prompt": "a", "response": "b"}\n'})

# --- Checkpoints ----------------------------------------------------------------------------------

WEIGHTS = "model/model.safetensors"


def _edit(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def _remove(directory: Path, pattern: str) -> None:
    for file in directory.glob(pattern):
        file.unlink()


def _pickled(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "model/pytorch_model.bin")


def _adapter_alone(directory: Path) -> None:
    (directory / "model/config.json").rename(directory / "model/adapter_config.json")


def _cut(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[: len(data) // 2])


def _garbled(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[:8] + b"{{{" + data[11:])


def _indexed(directory: Path, name: str) -> None:
    (directory / WEIGHTS).unlink()
    index = {"weight_map": {"lm_head.weight": name}}
    (directory / "model/model.safetensors.index.json").write_text(json.dumps(index))


def _untemplated(directory: Path) -> None:
    """A template that writes a lone chat otherwise than one that goes on."""
    (directory / "model/chat_template.jinja").write_text(
        "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}"
    )


def _other_tokenizer(directory: Path) -> None:
    """A tokenizer that knows more letters than the model."""
    tokenizer = letters_tokenizer("abcdefghijklmnopqrstuvwxyz")
    tokenizer.save_pretrained(directory / "model")


def bad_model(name: str, change: object, *texts: str, early: bool = True) -> None:
    bad(name, "sft", "", *texts, change=change, early=early)


bad("no such checkpoint", "sft", "model: {path: ./modle}\n", "./modle", "model.path",
    "there is no checkpoint directory", "name a directory with config.json")
bad("a file for a checkpoint", "sft", "model: {path: demos.jsonl}\n", "demos.jsonl", "model.path",
    "there is no checkpoint directory", "name a directory with config.json")
bad_model("a directory that is no checkpoint", lambda d: _remove(d, "model/config.json"), "model",
    "model.path", "without config.json", "name one, such as a run's `final`")
bad_model("adapters alone", _adapter_alone, "adapters alone", "model.path",
    "so it is no checkpoint", "merge them into their base")
bad_model("a configuration that is broken",
    lambda d: (d / "model/config.json").write_text('{"a": 1,\n'), "config.json",
    "model/config.json:2", "not valid JSON", "copy the checkpoint again")
bad_model("a configuration that is a list", lambda d: (d / "model/config.json").write_text("[]"),
    "config.json", "model/config.json:", "holds no object", "copy the checkpoint again")
bad_model("no weights", lambda d: (d / WEIGHTS).unlink(), "model", "model.path", "holds no weights",
    "put model.safetensors beside")
bad_model("weights as a pickle", _pickled, "pytorch_model.bin", "model.path",
    "a pickle, which can run any code", "take the checkpoint's safetensors")
bad_model("weights that are cut off", _cut, "bytes of weights", WEIGHTS, "where its header says",
    "copy the checkpoint again")
bad_model("weights with a damaged header", _garbled, "model.safetensors", WEIGHTS,
    "its header is damaged", "copy the checkpoint again")
bad_model("weights that are empty", lambda d: (d / WEIGHTS).write_bytes(b""), "0 bytes", WEIGHTS,
    "is cut off", "copy the checkpoint again")
bad_model("weights with a huge header",
    lambda d: (d / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"{}"), "10 bytes", WEIGHTS,
    "is cut off", "copy the checkpoint again")
bad_model("an index to nothing", lambda d: _indexed(d, "model-1.safetensors"),
    "model-1.safetensors", "model.safetensors.index.json", "which is not there",
    "copy the checkpoint again")
bad_model("an index that climbs out", lambda d: _indexed(d, "../../other.safetensors"),
    "'../../other.safetensors'", "model.safetensors.index.json", "no .safetensors file beside",
    "from a source you trust")
bad_model("no tokenizer", lambda d: _remove(d, "model/tokenizer*"), "model", "model.path",
    "has no tokenizer", "put tokenizer.json")
bad_model("a tokenizer that is broken", lambda d: (d / "model/tokenizer.json").write_text("{"),
    "tokenizer.json", "model/tokenizer.json:1", "not valid JSON", "copy the checkpoint again")
bad_model("a tokenizer without an end",
    lambda d: _edit(d / "model/tokenizer_config.json", eos_token=None), "EOS", "tokenizer of model",
    "no response could ever end", "set eos_token", early=False)
bad_model("a tokenizer with more tokens than the model", _other_tokenizer, "27 tokens",
    "tokenizer of model", "has embeddings for 12", "take the tokenizer", early=False)
bad_model("a kind of model that is none",
    lambda d: _edit(d / "model/config.json", model_type="lama"), "lama", "cannot load model",
    "does not recognize this architecture", "your version of Transformers", early=False)
bad("a template that does not keep prompts", "sft", "", "'", "demos.jsonl:1",
    "does not keep a prompt as the beginning", "Give single-turn data", early=False,
    change=_untemplated,
    files={"demos.jsonl": CHAT})
bad("answers beyond the context", "grpo", "sampling:\n  max_tokens: 64\n", "64",
    "sampling.max_tokens", "the context of model has 64 tokens", "lower it")
bad("held-out answers beyond the context", "grpo",
    "evaluation: {data: {path: held_out.jsonl}, max_tokens: 100}\n", "100", "evaluation.max_tokens",
    "the context of model has 64 tokens", "lower it")
bad("no such reward model", "ppo", "rewards: [{function: reward_model, arguments: {path: ./rm}}]\n",
    "./rm", "rewards.0.arguments.path", "there is no checkpoint directory", "name a directory")
bad("no such critic", "ppo", "critic: {model: {path: ./critic}}\n", "./critic", "critic.model.path",
    "there is no checkpoint directory", "name a directory")
bad("no such reference", "evaluate", "reference: {path: ./base}\n", "./base", "reference.path",
    "there is no checkpoint directory", "name a directory")
bad("a reference of other words", "evaluate", "reference: {path: other}\n", "other",
    "reference.path", "its tokenizer differs from that of model", "same vocabulary", early=False)
bad("a critic of other words", "ppo", "critic: {model: {path: other}}\n", "other",
    "critic.model.path", "whose vocabulary is not that of the actor",
    "train it from the actor's base model", early=False)
bad("a device that is not there", "sft", "model: {path: model, device: toaster}\n", "'toaster'",
    "model.device", "cannot be used", "Expected one of", early=False)

# --- Outputs, runs and the other commands ---------------------------------------------------------


def _file(name: str) -> object:
    return lambda directory: (directory / name).write_text("mine")


bad("an output that is there", "sample", "", "out.jsonl", "output = out.jsonl", "already exists",
    "overwrite=true", change=_file("out.jsonl"))
bad("pairs that are there", "pairs", "", "out.jsonl", "output = out.jsonl", "already exists",
    "overwrite=true", change=_file("out.jsonl"))
bad("numbers that are there", "evaluate", "output: out.json\n", "out.json", "output = out.json",
    "already exists", "overwrite=true", change=_file("out.json"))
bad("an output that is a directory", "sample", "overwrite: true\n", "out.jsonl",
    "output = out.jsonl", "is a directory", "name another file",
    change=lambda d: (d / "out.jsonl").mkdir())
bad("an output below a file", "sample", "output: reward.py/out.jsonl\n", "reward.py/out.jsonl",
    "output = reward.py/out.jsonl", "is a file, but a directory is needed", "name another path")
bad("a run at a file", "sft", "run: {directory: reward.py}\n", "reward.py", "run.directory",
    "is a file, where a directory is needed", "name another place")
bad("a run below a file", "grpo", "run: {directory: reward.py/run}\n", "reward.py/run",
    "run.directory", "is a file, but a directory is needed", "name another path")
bad("a comparison at a file", "compare", "directory: reward.py\n", "reward.py", "directory =",
    "is a file, but a directory is needed", "name another path")
bad("a run where other things lie", "sft", "run: {directory: mine}\n", "mine", "run.directory",
    "holds", "name", early=False,
    change=lambda d: ((d / "mine").mkdir(), (d / "mine/notes.txt").write_text("x")))
bad("a chat with no one", "", "", "./none", "./none", "there is no checkpoint directory",
    "name a directory", arguments=("chat", "./none"))
bad("a chat without heat", "", "", "sampling.temperature = -1",
    "argument `sampling.temperature=-1`", "must be greater than or equal to 0",
    "the default is 0.7", arguments=("chat", "model", "sampling.temperature=-1"))
bad("a chat template without a line", "", "", '"Q:"', 'argument `template="Q:"`', "write {line}",
    "where the input line belongs", arguments=("chat", "model", 'template="Q:"'))
bad("a report of no run", "", "", "model", "model:", "is not the directory of a run", "run.json",
    arguments=("report", "model"))
bad("a run to resume that is none", "", "", "none", "none:", "is not the directory of a run",
    "run.json", arguments=("resume", "./none"))
bad("no run to insist on", "sft", "run: {directory: nothing}\n", "nothing", "run.directory",
    "holds no run to go on with", "leave run.resume out to begin one", settings=("--resume",))
bad("a directory of something else", "sft", "run: {directory: model}\n", "model", "run.directory",
    "but no run", "name a new or empty directory")
bad("a page of no run", "", "", "none", "none:", "is not the directory of a run", "run.json",
    arguments=("watch", "./none"))
bad("a port that is none", "", "", "99999", "--port", "is not a port",
    "write a number from 0 to 65535", arguments=("watch", "model", "--port", "99999"))
bad("a demo at a file", "", "", "reward.py", "--directory", "is a file", "name another path",
    arguments=("demo", "--quick", "--directory", "reward.py"))
bad("a demo's seed below 0", "", "", "-1", "--seed", "is not a seed", "write a whole number from 0",
    arguments=("demo", "--seed=-1"))
bad("a demo's seed twice", "", "", "3", "--seed", "is given twice", "keep one",
    arguments=("demo", "--seed", "3", "3"))
bad("a setting with dashes", "grpo", "", "--beta=1", "unrecognized arguments",
    "settings have no dashes", "write beta=1", settings=("--beta=1",))
bad("no configuration at all", "", "", "CONFIG.yaml", "trivium grpo", "are required",
    "usage: trivium grpo", arguments=("grpo",))
