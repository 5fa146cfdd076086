"""Help texts of `trivium --help` and `trivium COMMAND --help`."""

DESCRIPTION = """\
Align language models by PPO, DPO and GRPO.

The commands that train and evaluate take a configuration file and settings that override it:
  trivium grpo grpo.yaml optimizer.learning_rate=2e-6 run.seed=1
`trivium COMMAND --help` shows an example, `trivium COMMAND --fields` lists all settings.
"""
CHAT = """\
Talk to a checkpoint. If it has a chat template, the lines form a conversation; otherwise the model
continues each line. /reset starts over, /quit or Ctrl-D exits, Ctrl-C stops a response.

example:
  trivium chat runs/grpo-20260101-120000 sampling.temperature=0.5 sampling.max_tokens=400
  trivium chat runs/sft/final 'template="Question: {line}\\nAnswer:"'
"""
CHECK_REWARDS = """\
Check the rewards of a configuration on the first rows of its data, without sampling: each reward
scores no text, an excuse, the row's own answer and the next row's. Rewards that fail, are constant
or ignore the response are reported, and tests of programs that check nothing.

example:
  trivium check-rewards grpo.yaml
  trivium check-rewards grpo.yaml --rows 1000 rewards.0.timeout=600
"""
DEMO = """\
Run every method on the built-in task, without a download: SFT from scratch, then GRPO, PPO and DPO,
side by side, evaluated on held-out problems. Rerun the command to resume a stopped demo.

example:
  trivium demo --quick
"""
RECIPES = """\
List the recipes that come with Trivium, or print one. A recipe without a command in its line is a
pipeline for `trivium run`.

example:
  trivium recipes
  trivium recipes instructgpt > mine.yaml
  trivium run mine.yaml
"""
REPORT = """\
Write a run's report to one HTML file: outcome, alarms, curves, evaluations, cost, samples and
configuration. The file needs no network and can be shared. For the directory of a comparison or a
pipeline, write its report.

example:
  trivium report runs/grpo-20260101-120000
  trivium report runs/grpo-20260101-120000 --output grpo.html --overwrite
"""
WATCH = """\
Serve the report of a run live while it trains, to this machine only. Ctrl-C stops the server.

example:
  trivium watch runs/grpo-20260101-120000
"""
PUSH = """\
Upload the model of a finished run, with its model card, to a repository on the Hugging Face Hub. A
new repository is private. Log in first: hf auth login. `--push OWNER/NAME` of a command that trains
uploads at the end of the run.

example:
  trivium push runs/grpo-20260101-120000 someone/my-model
"""
RESUME = """\
Resume a run that was stopped by Ctrl-C, a signal, a crash or a power failure. The run uses its own
configuration and continues from its last checkpoint, with the same results as without the stop.
Rerunning its command with its directory does the same.

example:
  trivium resume runs/grpo-20260101-120000
  trivium resume runs/grpo-20260101-120000 --allow-changes steps=200
"""
MEMORY = """\
Predict the memory of a run, by stage and model, and compare it with the free memory. If the run
does not fit, find micro-batches that do. Nothing is trained and no weights are read.

example:
  trivium memory grpo grpo.yaml
  trivium memory grpo grpo.yaml tokens_per_micro_batch=32768 model.gradient_checkpointing=true
"""
EXAMPLE = """\
example: {name}.yaml
{yaml}
  trivium {name} {name}.yaml {arguments}

A setting is written key.sub=value. A list entry is addressed by its index: rewards.0.weight=2.
"""
