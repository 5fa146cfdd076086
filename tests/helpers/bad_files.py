"""Invalid inputs: data files, checkpoints, outputs and run directories.

They extend the table of ``bad_inputs``.
"""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

from helpers.bad_inputs import bad
from helpers.tiny_models import letters_tokenizer

CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'

# As a table with two or three lines per case, the cases are easier to compare than with one
# argument per line.
# fmt: off

# --- Data files -----------------------------------------------------------------------------------


def bad_data(
    name: str, command: str, content: str | bytes, *texts: str, file: str = "", options: str = ""
) -> None:
    """Add a case whose data file has this content."""
    file = file or {"sft": "demos.jsonl", "dpo": "pairs.jsonl"}.get(command, "prompts.jsonl")
    yaml = f"data: {{path: {file}{options}}}\n"
    bad(name, command, yaml, *texts, files={file: content})


bad("missing data file", "sft", "data: {path: demo.jsonl}\n", "demo.jsonl", "demo.jsonl:",
    "there is no such file", "did you mean demos.jsonl?")
bad("directory with several files", "sft", "data: {path: .}\n", "demos.jsonl", ".:",
    "is a directory with", "set `split`")
bad("unknown split", "sft", "data: {path: ., split: trian}\n", "trian", ".:",
    "has no file named trian.*", "its files are")
bad("split of a single file", "sft", "data: {path: demos.jsonl, split: train}\n", "train",
    "demos.jsonl:", "has no `split`", "remove it")
bad("subset of a single file", "sft", "data: {path: demos.jsonl, subset: main}\n", "main",
    "demos.jsonl:", "is for hub datasets", "remove it")
bad_data("unknown file format", "sft", "x", "demos.txt", "demos.txt:", "its format is unknown",
    "rename or convert it", file="demos.txt")
bad_data("empty file", "grpo", "", "no rows", "prompts.jsonl:", "contains no rows",
    "write at least one")
bad_data("blank lines only", "grpo", "\n \n", "no rows", "prompts.jsonl:", "contains no rows",
    "write at least one")
bad_data("invalid JSON", "grpo", '{"prompt": "a"}\n\n{"prompt": b}\n', "column 12",
    "prompts.jsonl:3", "not valid JSON", "Expecting value")
bad_data("truncated line", "grpo", '{"prompt": "a"}\n{"prompt": "b', "column",
    "prompts.jsonl:2", "not valid JSON", "Unterminated string")
bad_data("row that is a list", "grpo", '["a"]\n', "['a']", "prompts.jsonl:1", "not a row",
    "write an object")
bad_data("row that is null", "grpo", '{"prompt": "a"}\nnull\n', "None", "prompts.jsonl:2",
    "not a row", "write an object")
bad_data("prompt that is a number", "grpo", '{"prompt": 3}\n', "3", "prompts.jsonl:1",
    "not messages", "write a list such as")
bad_data("prompt that is null", "grpo", '{"prompt": null}\n', "`prompt`", "prompts.jsonl:1",
    "is null", "give it a value or remove the row")
bad_data("misspelled column", "grpo", '{"promt": "a"}\n', "promt", "prompts.jsonl:1",
    "no column `prompt`", "columns: {prompt: promt}")
bad_data("file that is not UTF-8", "grpo", b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "0xe9",
    "prompts.jsonl:2", "is not UTF-8", "save the file as UTF-8")
bad_data("half of a surrogate pair", "grpo", '{"prompt": "\\ud83d"}\n', "character 0",
    "prompts.jsonl:1", "half of a surrogate pair", "repair the escape")
bad_data("CSV line in a JSON lines file", "grpo", '{"prompt": "a"}\nprompt,answer\n', "column 1",
    "prompts.jsonl:2", "not valid JSON", "Expecting value")
bad_data("CSV row with too many fields", "grpo", "prompt,answer\na,b,c\n", "3 fields",
    "prompts.csv:2", "and the first line names 2", "in double quotes", file="prompts.csv")
bad_data("repeated CSV column", "grpo", "prompt,prompt\na,b\n", "`prompt`", "prompts.csv:1",
    "appears twice", "rename one", file="prompts.csv")
bad_data("unclosed quote in CSV", "grpo", 'prompt\n"a\n', "CSV", "prompts.csv:", "not valid CSV",
    "check its quotes", file="prompts.csv")
bad_data("truncated JSON array", "grpo", '[{"prompt": "a"},\n {"prompt"', "prompts.json",
    "prompts.json:2", "not valid JSON", "delimiter", file="prompts.json")
bad_data("truncated gzip file", "grpo", gzip.compress(b'{"prompt": "a"}\n' * 99)[:30],
    "prompts.jsonl.gz", "prompts.jsonl.gz:", "cannot be read: ", "ended before",
    file="prompts.jsonl.gz")
bad_data("file that is not gzip", "grpo", b"PK\x03\x04 not gzip", "prompts.jsonl.gz",
    "prompts.jsonl.gz:", "cannot be read: ", "Not a gzipped file", file="prompts.jsonl.gz")
bad_data("file that is not Parquet", "grpo", b"PAR1 and no more", "prompts.parquet",
    "prompts.parquet:", "not a readable Parquet file", "Parquet", file="prompts.parquet")
bad_data("unknown source of a column", "grpo", '{"question": "a"}\n', "`qestion`",
    "prompts.jsonl:1", "which `columns` gives for prompt", "did you mean `question`?",
    options=", columns: {prompt: qestion}")
bad_data("unknown column in a template", "grpo", '{"question": "a"}\n', "{qestion}",
    "prompts.jsonl:1", "`template` names", "did you mean {question}?",
    options=", template: '{qestion}'")
bad_data("list in a template", "grpo", '{"question": ["a"]}\n', "['a']", "prompts.jsonl:1",
    "`template` names {question}", "a template takes text or numbers",
    options=", template: '{question}'")
bad_data("system message for plain text", "grpo", '{"prompt": "a"}\n', "plain text",
    "prompts.jsonl:1", "cannot have a `system` message", "set `chat: true`",
    options=", system: be kind")
bad_data("prompt that ends with an assistant turn", "grpo",
    '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    "column `prompt`", "prompts.jsonl:1", "ends with an assistant turn", "end it with another turn")
bad_data("message without a role", "grpo", '{"prompt": [{"content": "a"}]}\n', "content",
    "prompts.jsonl:1", "has no `role`", "Write `role` and `content`")
bad_data("several invalid rows", "grpo", '{"prompt": 3}\n{"prompt": "a"}\n{"prompt": null}\n',
    "3", "prompts.jsonl:3", "not messages", "give it a value or remove the row")
bad_data("a thousand invalid rows", "grpo", '{"prompt": null}\n' * 1000, "10 faulty rows",
    "prompts.jsonl:10", "reading stopped", "give it a value or remove the row")
bad_data("demonstration without a response", "sft", '{"prompt": "a"}\n', "prompt", "demos.jsonl:1",
    "no demonstration", "name them, as in `columns:")
bad_data("response that is a number", "sft", '{"prompt": "a", "completion": 3}\n', "3",
    "demos.jsonl:1", "not messages", "write a list such as")
bad_data("empty responses", "sft", '{"prompt": "a", "completion": " "}\n' * 2,
    "2 dropped: empty response", "demos.jsonl:", "no row is left", "give rows")
bad_data("chat without an assistant turn", "sft",
    '{"messages": [{"role": "user", "content": "a"}]}\n', "column `messages`", "demos.jsonl:1",
    "no assistant turn after", "a demonstration needs one")
bad_data("messages after a plain-text prompt", "sft",
    '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}\n',
    "`completion` is messages", "demos.jsonl:1", "the prompt is plain text", "set `chat: true`")
bad_data("chat option for plain text", "sft", '{"text": "a"}\n', "column `text`", "demos.jsonl:1",
    "is not a chat", "remove `chat`", options=", chat: true")
bad_data("pair without a rejected response", "dpo", '{"prompt": "a", "chosen": "b"}\n',
    "`rejected`", "pairs.jsonl:1", "no column", "columns: {rejected:")
bad_data("pairs of equal responses", "dpo", '{"prompt": "a", "chosen": "b", "rejected": "b"}\n',
    "1 dropped: chosen equals rejected", "pairs.jsonl:", "no row is left", "give rows")
bad_data("pairs with an empty response", "dpo", '{"prompt": "a", "chosen": "", "rejected": "b"}\n',
    "1 dropped: empty response", "pairs.jsonl:", "no row is left", "give rows")
bad_data("pair without a prompt", "dpo", '{"chosen": "x y", "rejected": "z y"}\n', "`prompt`",
    "pairs.jsonl:1", "do not begin with the same word", "name the prompt's column")
bad_data("chats without a common message", "dpo",
    '{"chosen": [{"role": "user", "content": "a"}], "rejected": '
    '[{"role": "user", "content": "b"}]}\n',
    "`chosen`", "pairs.jsonl:1", "do not begin with the same message", "name the prompt's column")
bad_data("pair of text and a number", "dpo", '{"prompt": "a", "chosen": "b", "rejected": 3}\n', "3",
    "pairs.jsonl:1", "not messages", "write a list such as")
bad_data("dialogues with a template", "dpo",
    '{"chosen": [{"role": "user", "content": "a"}], "rejected": '
    '[{"role": "user", "content": "a"}]}\n',
    "`template`", "pairs.jsonl:1", "are whole dialogues", "remove `template`",
    options=", template: x")

_STEP_DATA = "steps: {path: steps.jsonl}\n"


def bad_steps(name: str, row: str, *texts: str) -> None:
    bad(name, "reward-model", _STEP_DATA, *texts, files={"steps.jsonl": row}, without=("pairs",))


bad_steps("steps that are text", '{"prompt": "a", "completions": "b", "labels": [1]}\n', "'b'",
    "steps.jsonl:1", "column `completions`", "write a list of texts")
bad_steps("step without a label", '{"prompt": "a", "completions": ["b", "c"], "labels": [1]}\n',
    "2 `completions` and 1 `labels`", "steps.jsonl:1", "has 2", "each step needs one")
bad_steps("label above 1", '{"prompt": "a", "completions": ["b"], "labels": [2]}\n', "2",
    "steps.jsonl:1", "label 1", "a number in [0, 1]")
bad_steps("label that is text", '{"prompt": "a", "completions": ["b"], "labels": ["+"]}\n', "'+'",
    "steps.jsonl:1", "label 1", "a number in [0, 1]")
bad_steps("empty step", '{"prompt": "a", "completions": ["b", ""], "labels": [1, 0]}\n',
    "step 2", "steps.jsonl:1", "is empty", "remove it and its label")


def bad_solutions(name: str, row: str, *texts: str, yaml: str = "") -> None:
    bad(name, "label-steps", yaml, *texts, files={"solutions.jsonl": row})


bad_solutions("prompt without a solution", '{"prompt": "a", "answer": "b"}\n', "`completion`",
    "solutions.jsonl:1", "no column", "set `columns: {completion: ")
bad_solutions("solution that is a number", '{"prompt": "a", "completion": 3}\n', "3",
    "solutions.jsonl:1", "not text", "put it in quotes")
bad_solutions("no solutions in a list", '{"prompt": "a", "completion": []}\n', "[]",
    "solutions.jsonl:1", "column `completion` is", "write a solution, or a list of them")
bad_solutions("only empty solutions", '{"prompt": "a", "completion": " "}\n', "1 dropped",
    "solutions.jsonl", "empty solution", "give rows that can be used")
bad_solutions("solutions without separators",
    '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "c d"}\n', "'\\n'",
    "solutions.jsonl", "none of 2 solutions has two steps", "set `separator` to the text between")

bad("invalid held-out prompts", "grpo", "evaluation: {data: {path: held_out.jsonl}}\n",
    "column 2", "held_out.jsonl:1", "not valid JSON", "Expecting property name",
    files={"held_out.jsonl": "{prompt}\n"})
bad("missing validation file", "sft", "validation: {path: held.jsonl}\n", "held.jsonl",
    "held.jsonl:", "there is no such file", "held_out.jsonl?")
bad("invalid pretraining texts", "ppo", "pretraining: {data: {path: demos.jsonl}}\n", "2",
    "demos.jsonl:1", "not messages", "write a list such as",
    files={"demos.jsonl": '{"prompt": "a", "completion": 2}\n'})
_CANDIDATES = "data: {path: candidates.jsonl}\ncandidates: [{response: %s, score: %s}]\n"
_NO_MODEL = ("model", "rewards", "sampling")
bad("unknown field of a candidate", "pairs", _CANDIDATES % ("text", "scores"), "`text`",
    "candidates.jsonl:1", "there is no", "did you mean `texts`?", without=_NO_MODEL)
bad("score that is text", "pairs", _CANDIDATES % ("texts", "texts"), "'c'", "candidates.jsonl:1",
    "`texts` is", "a score must be true, false or a finite number", without=_NO_MODEL)
bad("fewer scores than responses", "pairs", _CANDIDATES % ("texts", "scores"), "2 responses",
    "candidates.jsonl:1", "1 scores", "each response needs one", without=_NO_MODEL,
    files={"candidates.jsonl": '{"prompt": "a", "texts": ["c", "d"], "scores": [1]}\n'})

# --- Data that does not fit the model -------------------------------------------------------------

bad("prompt above its limit", "grpo", "data: {path: prompts.jsonl, max_prompt_tokens: 1}\n",
    "2 tokens", "prompts.jsonl:1", "`max_prompt_tokens` is 1", "set `long_prompts: drop`",
    early=False)
bad("response above its limit", "sft", "data: {path: demos.jsonl, max_response_tokens: 1}\n",
    "2 tokens", "demos.jsonl:1", "`max_response_tokens` is 1", "set `long_responses`", early=False)
_LONG = "ab" * 40
bad("prompt above the context", "grpo", "", "80 tokens", "prompts.jsonl:1", "leaves room for 56",
    "set `max_prompt_tokens` and `long_prompts: drop`", early=False,
    files={"prompts.jsonl": json.dumps({"prompt": _LONG}) + "\n"})
bad("demonstration above the context", "sft", "", "83 tokens", "demos.jsonl:1",
    "the model's context holds 64", "`long_responses: drop` or `truncate`", early=False,
    files={"demos.jsonl": json.dumps({"prompt": "ab", "completion": _LONG}) + "\n"})
bad("pair above the context", "dpo", "", "82 tokens", "pairs.jsonl:1",
    "the model's context holds 64", "`long_responses: drop`", early=False,
    files={"pairs.jsonl": json.dumps({"prompt": "a", "chosen": _LONG, "rejected": "b"}) + "\n"})
bad("messages without a chat template", "sft", "", "chat template", "tokenizer of model",
    "the data contains messages", "use a chat model", early=False,
    files={"demos.jsonl": CHAT})
bad("columns that the output would overwrite", "sample", "", "response", "the data has the columns",
    "uses for the response", "rename them in the data", early=False,
    files={"prompts.jsonl": '{"prompt": "a", "response": "b"}\n'})

# --- Checkpoints ----------------------------------------------------------------------------------

WEIGHTS = "model/model.safetensors"


def _set_keys(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def _delete(directory: Path, pattern: str) -> None:
    for file in directory.glob(pattern):
        file.unlink()


def _pickle_weights(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "model/pytorch_model.bin")


def _adapters_only(directory: Path) -> None:
    (directory / "model/config.json").rename(directory / "model/adapter_config.json")


def _truncate_weights(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[: len(data) // 2])


def _damage_header(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[:8] + b"{{{" + data[11:])


def _write_index(directory: Path, name: str) -> None:
    (directory / WEIGHTS).unlink()
    index = {"weight_map": {"lm_head.weight": name}}
    (directory / "model/model.safetensors.index.json").write_text(json.dumps(index))


def _write_unstable_template(directory: Path) -> None:
    """Write a template that renders a prompt differently within a longer chat."""
    (directory / "model/chat_template.jinja").write_text(
        "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}"
    )


def _save_larger_tokenizer(directory: Path) -> None:
    """Save a tokenizer with more letters than the model's embeddings."""
    tokenizer = letters_tokenizer("abcdefghijklmnopqrstuvwxyz")
    tokenizer.save_pretrained(directory / "model")


def bad_model(name: str, change: object, *texts: str, early: bool = True) -> None:
    bad(name, "sft", "", *texts, change=change, early=early)


bad("missing checkpoint", "sft", "model: {path: ./modle}\n", "./modle", "model.path",
    "there is no checkpoint directory", "name a directory with config.json")
bad("checkpoint that is a file", "sft", "model: {path: demos.jsonl}\n", "demos.jsonl", "model.path",
    "is a file", "name a directory with config.json")
bad_model("directory without a checkpoint", lambda d: _delete(d, "model/config.json"), "model",
    "model.path", "without config.json", "name one, such as a run's `final`")
bad_model("adapters without a base", _adapters_only, "adapter_config.json", "model.path",
    "names no base", "write its path as base_model_name_or_path")
bad_model("invalid JSON in config.json",
    lambda d: (d / "model/config.json").write_text('{"a": 1,\n'), "config.json",
    "model/config.json:2", "not valid JSON", "copy the checkpoint again")
bad_model("config.json that is a list", lambda d: (d / "model/config.json").write_text("[]"),
    "config.json", "model/config.json:", "is not a JSON object", "copy the checkpoint again")
bad_model("missing weights", lambda d: (d / WEIGHTS).unlink(), "model", "model.path",
    "holds no weights", "put model.safetensors beside")
bad_model("weights in a pickle", _pickle_weights, "pytorch_model.bin", "model.path",
    "a pickle, which can run any code", "use the checkpoint's safetensors")
bad_model("truncated weights", _truncate_weights, "bytes of weights", WEIGHTS,
    "where its header says", "copy the checkpoint again")
bad_model("weights with a damaged header", _damage_header, "model.safetensors", WEIGHTS,
    "its header is damaged", "copy the checkpoint again")
bad_model("empty weights", lambda d: (d / WEIGHTS).write_bytes(b""), "0 bytes", WEIGHTS,
    "is truncated or not a safetensors file", "copy the checkpoint again")
bad_model("weights with a huge header",
    lambda d: (d / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"{}"), "10 bytes", WEIGHTS,
    "is truncated or not a safetensors file", "copy the checkpoint again")
bad_model("index of a missing file", lambda d: _write_index(d, "model-1.safetensors"),
    "model-1.safetensors", "model.safetensors.index.json", "which is not there",
    "copy the checkpoint again")
bad_model("index of a file outside the checkpoint",
    lambda d: _write_index(d, "../../other.safetensors"), "'../../other.safetensors'",
    "model.safetensors.index.json", "not a .safetensors file beside", "from a source you trust")
bad_model("missing tokenizer", lambda d: _delete(d, "model/tokenizer*"), "model", "model.path",
    "has no tokenizer", "put tokenizer.json")
bad_model("invalid JSON in tokenizer.json", lambda d: (d / "model/tokenizer.json").write_text("{"),
    "tokenizer.json", "model/tokenizer.json:1", "not valid JSON", "copy the checkpoint again")
bad_model("tokenizer without EOS",
    lambda d: _set_keys(d / "model/tokenizer_config.json", eos_token=None), "EOS",
    "tokenizer of model", "no response could ever end", "set eos_token", early=False)
bad_model("tokenizer with more tokens than the model", _save_larger_tokenizer, "27 tokens",
    "tokenizer of model", "has embeddings for 12", "take the tokenizer", early=False)
bad_model("unknown model type",
    lambda d: _set_keys(d / "model/config.json", model_type="lama"), "lama", "cannot load model",
    "does not recognize this architecture", "your version of Transformers", early=False)
bad("template that changes prompts", "sft", "", "'", "demos.jsonl:1",
    "does not render a prompt as a prefix", "Give single-turn data", early=False,
    change=_write_unstable_template,
    files={"demos.jsonl": CHAT})
bad("responses above the context", "grpo", "sampling:\n  max_tokens: 64\n", "64",
    "sampling.max_tokens", "the context of model has 64 tokens", "lower it")
bad("held-out responses above the context", "grpo",
    "evaluation: {data: {path: held_out.jsonl}, max_tokens: 100}\n", "100", "evaluation.max_tokens",
    "the context of model has 64 tokens", "lower it")
bad("missing reward model", "ppo", "rewards: [{function: reward_model, arguments: {path: ./rm}}]\n",
    "./rm", "rewards.0.arguments.path", "there is no checkpoint directory", "name a directory")
bad("missing critic", "ppo", "critic: {model: {path: ./critic}}\n", "./critic", "critic.model.path",
    "there is no checkpoint directory", "name a directory")
bad("missing reference", "evaluate", "reference: {path: ./base}\n", "./base", "reference.path",
    "there is no checkpoint directory", "name a directory")
bad("reference with another vocabulary", "evaluate", "reference: {path: other}\n", "other",
    "reference.path", "its tokenizer differs from that of model", "same vocabulary", early=False)
bad("critic with another vocabulary", "ppo", "critic: {model: {path: other}}\n", "other",
    "critic.model.path", "whose vocabulary is not that of the actor",
    "train it from the actor's base model", early=False)
bad("unknown device", "sft", "model: {path: model, device: toaster}\n", "'toaster'",
    "model.device", "cannot be used", "Expected one of", early=False)

# --- Outputs, runs and the other commands ---------------------------------------------------------


def _write_file(name: str) -> object:
    return lambda directory: (directory / name).write_text("mine")


bad("existing output", "sample", "", "out.jsonl", "output = out.jsonl", "already exists",
    "overwrite=true", change=_write_file("out.jsonl"))
bad("existing pairs", "pairs", "", "out.jsonl", "output = out.jsonl", "already exists",
    "overwrite=true", change=_write_file("out.jsonl"))
bad("existing labels", "label-steps", "", "out.jsonl", "output = out.jsonl", "already exists",
    "overwrite=true", change=_write_file("out.jsonl"))
bad("another file in the place of unfinished labels", "label-steps", "", "out.jsonl.partial",
    "output = out.jsonl", "not an unfinished file of this command", "delete it", early=False,
    change=lambda d: (d / "out.jsonl.partial").write_text("mine\n"))
bad("existing evaluation output", "evaluate", "output: out.json\n", "out.json", "output = out.json",
    "already exists", "overwrite=true", change=_write_file("out.json"))
bad("output that is a directory", "sample", "overwrite: true\n", "out.jsonl",
    "output = out.jsonl", "is a directory", "name another file",
    change=lambda d: (d / "out.jsonl").mkdir())
bad("output below a file", "sample", "output: reward.py/out.jsonl\n", "reward.py/out.jsonl",
    "output = reward.py/out.jsonl", "is a file, but a directory is needed", "name another path")
bad("run directory that is a file", "sft", "run: {directory: reward.py}\n", "reward.py",
    "run.directory", "is a file, but a directory is needed", "name another path")
bad("run directory below a file", "grpo", "run: {directory: reward.py/run}\n", "reward.py/run",
    "run.directory", "is a file, but a directory is needed", "name another path")
bad("comparison directory that is a file", "compare", "directory: reward.py\n", "reward.py",
    "directory =", "is a file, but a directory is needed", "name another path")
bad("run directory with other files", "sft", "run: {directory: mine}\n", "mine", "run.directory",
    "holds", "name", early=False,
    change=lambda d: ((d / "mine").mkdir(), (d / "mine/notes.txt").write_text("x")))
bad("chat with a missing checkpoint", "", "", "./none", "./none",
    "there is no checkpoint directory", "name a directory", arguments=("chat", "./none"))
bad("chat with a negative temperature", "", "", "sampling.temperature = -1",
    "argument `sampling.temperature=-1`", "must be greater than or equal to 0",
    "the default is 0.7", arguments=("chat", "model", "sampling.temperature=-1"))
bad("chat template without {line}", "", "", '"Q:"', 'argument `template="Q:"`', "write {line}",
    "where the input line belongs", arguments=("chat", "model", 'template="Q:"'))
bad("report of a directory without a run", "", "", "model", "model:",
    "is not the directory of a run", "run.json", arguments=("report", "model"))
bad("resume of a missing run", "", "", "none", "none:", "is not the directory of a run",
    "run.json", arguments=("resume", "./none"))
bad("--resume without a run", "sft", "run: {directory: nothing}\n", "nothing", "run.directory",
    "holds no run to resume", "leave run.resume out to start a new run", settings=("--resume",))
bad("run directory with a checkpoint", "sft", "run: {directory: model}\n", "model", "run.directory",
    "but no run", "name a new or empty directory")
bad("watch of a missing run", "", "", "none", "none:", "is not the directory of a run", "run.json",
    arguments=("watch", "./none"))
bad("invalid port", "", "", "99999", "--port", "is not a port",
    "write a number from 0 to 65535", arguments=("watch", "model", "--port", "99999"))
bad("demo directory that is a file", "", "", "reward.py", "--directory", "is a file",
    "name another path", arguments=("demo", "--quick", "--directory", "reward.py"))
bad("negative demo seed", "", "", "-1", "--seed", "is not a seed", "write a whole number from 0",
    arguments=("demo", "--seed=-1"))
bad("repeated demo seed", "", "", "3", "--seed", "is given twice", "keep one",
    arguments=("demo", "--seed", "3", "3"))
bad("setting with dashes", "grpo", "", "--beta=1", "unrecognized arguments",
    "settings have no dashes", "write beta=1", settings=("--beta=1",))
bad("missing configuration", "", "", "CONFIG.yaml", "trivium grpo", "are required",
    "usage: trivium grpo", arguments=("grpo",))
