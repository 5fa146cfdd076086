"""What the command line says of itself, in `trivium --help` and `trivium COMMAND --help`."""

DESCRIPTION = """\
Align language models by PPO, DPO and GRPO.

The commands that train and measure take a configuration file and settings that correct it:
  trivium grpo grpo.yaml optimizer.learning_rate=2e-6 run.seed=1
`trivium COMMAND --help` shows an example, `trivium COMMAND --fields` every setting there is.
"""
CHAT = """\
Talk to a checkpoint. With a chat template the lines are a conversation; without one each line is
continued. /reset begins anew, /quit or Ctrl-D leaves, Ctrl-C cuts an answer short.

example:
  trivium chat runs/grpo-20260101-120000 sampling.temperature=0.5 sampling.max_tokens=400
  trivium chat runs/sft/final 'template="Question: {line}\\nAnswer:"'
"""
DEMO = """\
Run every method on the embedded task, with no download: SFT from scratch, then GRPO, PPO and DPO,
side by side, evaluated on held-out problems. A demo that was stopped goes on where it was.

example:
  trivium demo --quick
"""
REPORT = """\
Write what a run's directory says to one HTML file: outcome, alarms, curves, evaluations, cost,
samples, configuration. It opens from disk, needs no network, and can be sent to others. Of a
comparison's directory, write the comparison.

example:
  trivium report runs/grpo-20260101-120000
  trivium report runs/grpo-20260101-120000 --output grpo.html --overwrite
"""
WATCH = """\
Serve the same page live while a run goes on, to this machine only. Ctrl-C ends it.

example:
  trivium watch runs/grpo-20260101-120000
"""
RESUME = """\
Go on with a run that was stopped, by Ctrl-C, a signal, a crash or the end of the machine, as if it
had not been: with its own configuration, from its last saved state. Giving its command again in its
directory does the same.

example:
  trivium resume runs/grpo-20260101-120000
  trivium resume runs/grpo-20260101-120000 --allow-changes steps=200
"""
MEMORY = """\
Say what a run would need, stage by stage and model by model, and whether that fits the memory that
is free here; if not, with which micro-batches it does. Nothing is trained and no weight is read.

example:
  trivium memory grpo grpo.yaml
  trivium memory grpo grpo.yaml tokens_per_micro_batch=32768 model.gradient_checkpointing=true
"""
EXAMPLE = """\
example: {name}.yaml
{yaml}
  trivium {name} {name}.yaml {arguments}

A setting is written key.sub=value, and an entry of a list by its number, as in rewards.0.weight=2.
"""
