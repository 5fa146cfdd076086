"""Bad inputs with a fault in a configuration, a setting or a reward; see ``bad_inputs``."""

from __future__ import annotations

from helpers.bad_inputs import bad

# Table rows of two or three lines are easier to compare than one text per line.
# fmt: off

# --- Configurations that cannot be read -----------------------------------------------------------

bad("unknown command", "", "", "`gpro`", "is not a command", "is not a command",
    "did you mean `grpo`?", arguments=("gpro", "grpo.yaml"))
bad("no configuration file", "grpo", "", "grop.yaml", "grop.yaml:", "there is no such file",
    "did you mean grpo.yaml?", arguments=("grpo", "grop.yaml"), files={"grpo.yaml": "beta: 1"})
bad("a directory as configuration", "grpo", "", "model", "model:", "is a directory",
    "name the YAML file in it", arguments=("grpo", "model"))
bad("configuration in another encoding", "grpo", b"\xff\xfe\x00", "UTF-8", "grpo.yaml:",
    "is not UTF-8", "UTF-8 text")
bad("broken YAML", "grpo", "beta: {1\n", "got ':'", "grpo.yaml:2", "not valid YAML", "in quotes")
bad("tab in YAML", "grpo", "beta: 1\n\tkl: k1\n", "'\\t'", "grpo.yaml:2", "not valid YAML",
    "in quotes")
bad("a list as configuration", "grpo", b"- 3\n", "[3]", "grpo.yaml:", "not a configuration",
    "write `key: value` lines")
bad("an empty configuration", "grpo", b"", "`model`", "grpo.yaml:", "is missing",
    "write a value for it")
bad("a key twice", "grpo", "beta: 1\nbeta: 2\n", "`beta`", "grpo.yaml:2", "given twice", "keep one")
bad("a tag that constructs an object", "grpo", "beta: !!python/name:os.system x\n",
    "python/name:os.system", "grpo.yaml:1", "is not allowed", "remove it")
bad("anchors that multiply", "grpo", "beta: &a [*a]\n", "50 deep", "grpo.yaml:1", "nest more than",
    "does an anchor contain itself")
bad("an argument without value", "grpo", "", "`beta`", "argument `beta`", "not an assignment",
    "write key=value", settings=("beta",))
bad("an index beyond a list", "grpo", "", "rewards.3", "argument `rewards.3.weight=1`",
    "`rewards` ends with", "give the whole list", settings=("rewards.3.weight=1",))
bad("an argument with a comment", "grpo", "", "`# b`", "argument `run.directory=a # b`",
    "reads as a comment", "in quotes", settings=("run.directory=a # b",))

# --- Keys and types -------------------------------------------------------------------------------

bad("unknown key", "grpo", "betta: 1\n", "`betta`", "grpo.yaml:1", "is not a known key",
    "did you mean `beta`?")
bad("unknown key in a section", "ppo", "critic:\n  clipp: 1\n", "`critic.clipp`", "ppo.yaml:2",
    "is not a known key", "did you mean `critic.clip`?")
bad("unknown key in a list", "grpo", "rewards:\n- function: gsm8k\n  wieght: 2\n",
    "`rewards.0.wieght`", "grpo.yaml:3", "is not a known key", "did you mean `rewards.0.weight`?")
bad("key of another section", "grpo", "learning_rate: 1\n", "`learning_rate`", "grpo.yaml:1",
    "is not a known key", "did you mean `optimizer.learning_rate`?")
bad("unknown argument", "sft", "", "`epoch`", "argument `epoch=2`", "is not a known key",
    "did you mean `epochs`?", settings=("epoch=2",))
bad("unknown monitor", "grpo", "run: {monitors: {entropie: {action: stop}}}\n",
    "`run.monitors.entropie`", "grpo.yaml:1", "is not a known key",
    "did you mean `run.monitors.entropy`?")
bad("missing rewards", "grpo", "", "`rewards`", "grpo.yaml:", "is missing", "write a value for it",
    without=("rewards",))
bad("missing path", "sft", "data: {limit: 3}\n", "data.path", "sft.yaml:1", "is missing",
    "it must be a file")
bad("text for a number", "grpo", "epochs: two\n", '"two"', "grpo.yaml:1", "must be a whole number",
    "the default is 1")
bad("a fraction for a whole number", "grpo", "epochs: 2.0\n", "epochs = 2.0", "grpo.yaml:1",
    "must be a whole number", "write 2")
bad("a number in quotes", "ppo", "steps: '3'\n", '"3"', "ppo.yaml:1", "must be a whole number",
    "not in quotes")
bad("text for a boolean", "grpo", "mask_truncated: yes\n", '"yes"', "grpo.yaml:1",
    "must be true or false", "true or false")
bad("null for a number", "dpo", "beta:\n", "beta = null", "dpo.yaml:1", "must be a number",
    "leave the key out")
bad("a list for text", "sft", "model: {path: [a]}\n", 'model.path = ["a"]', "sft.yaml:1",
    "must be text", "text")
bad("a number for a section", "grpo", "data: 3\n", "data = 3", "grpo.yaml:1", "must be a section",
    "`key: value` lines")
bad("a section for a list", "grpo", "rewards: {function: gsm8k}\n", "rewards", "grpo.yaml:1",
    "must be a list", "list")
bad("a number that is NaN", "grpo", "beta: .nan\n", "beta = NaN", "grpo.yaml:1", "must be a finite",
    "the default is 0.04")
bad("an infinite number", "dpo", "beta: .inf\n", "beta = Infinity", "dpo.yaml:1",
    "must be a finite", "the default is 0.1")
bad("an unknown choice", "grpo", "kl: k4\n", 'kl = "k4"', "grpo.yaml:1",
    "must be 'k1', 'k2', 'k3' or file.py:function", "'k3'")
bad("an unknown dtype", "sft", "model: {path: model, dtype: float16}\n", '"float16"',
    "sft.yaml:1", "must be 'auto', 'float32'", "did you mean")
bad("all faults at once", "grpo", "betta: 1\nepochs: 0\nclip_low: 2\n", "epochs = 0", "grpo.yaml:2",
    "found 3 faults", "did you mean `beta`?")

# --- Values out of bounds: key, value, command, remedy --------------------------------------------

_BOUNDS = [
    ("grpo", "responses_per_prompt", "1", "the default is 8"),
    ("grpo", "clip_low", "0", "the default is 0.2"),
    ("grpo", "clip_low", "1.5", "the default is 0.2"),
    ("grpo", "clip_high", "-0.1", "the default is 0.2"),
    ("grpo", "beta", "-0.1", "the default is 0.04"),
    ("grpo", "epochs", "0", "the default is 1"),
    ("grpo", "minibatches", "0", "the default is 1"),
    ("grpo", "prompts_per_step", "0", "the default is 16"),
    ("grpo", "tokens_per_micro_batch", "0", "the default is 16384"),
    ("grpo", "iterations", "0", "the default is 1"),
    ("grpo", "steps_per_iteration", "0", "the default is 100"),
    ("grpo", "importance_sampling_cap", "0", "Largest weight"),
    ("ppo", "importance_sampling_cap", "-1", "Largest weight"),
    ("grpo", "dynamic_sampling", "-1", "greater than or equal to 0"),
    ("grpo", "sampling.temperature", "-1", "the default is 1"),
    ("grpo", "sampling.top_p", "0", "the default is 1"),
    ("grpo", "sampling.top_p", "1.5", "the default is 1"),
    ("grpo", "sampling.top_k", "-1", "0 keeps all"),
    ("grpo", "sampling.min_p", "1", "0 keeps all"),
    ("grpo", "sampling.max_tokens", "0", "the default is 256"),
    ("grpo", "optimizer.learning_rate", "0", "the default is 1e-06"),
    ("sft", "optimizer.learning_rate", "2000", "the default is 2e-05"),
    ("grpo", "optimizer.warmup_steps", "-1", "Optimizer steps over which"),
    ("grpo", "optimizer.epsilon", "0", "the default is 1e-08"),
    ("grpo", "optimizer.weight_decay", "-1", "Weight decay, on matrices"),
    ("grpo", "optimizer.warmup_ratio", "1", "a share of the run's optimizer steps"),
    ("grpo", "optimizer.warmup_start_ratio", "1.5", "Rate of the first step"),
    ("grpo", "optimizer.alpha", "1", "the default is 0.99"),
    ("grpo", "optimizer.max_grad_norm", "0", "the default is 1"),
    ("grpo", "optimizer.min_lr_ratio", "2", "share of the peak"),
    ("grpo", "run.seed", "-1", "Seed of every random choice"),
    ("grpo", "run.samples", "-1", "the default is 8"),
    ("grpo", "run.monitors.kl.limit", "0", "the default is 10"),
    ("grpo", "run.budget.seconds", "0", "Wall-clock"),
    ("grpo", "model.lora.rank", "0", "the default is 16"),
    ("grpo", "model.lora.alpha", "0", "Scale of the adapters"),
    ("grpo", "run.checkpoints.keep_finished", "-1", "the default is 1"),
    ("grpo", "model.lora.targets", "[]", "all-linear"),
    ("grpo", "model.lora.seed", "-1", "initial values"),
    ("grpo", "model.path", "''", "hub name"),
    ("grpo", "model.device", "GPU 0", 'the default is "auto"'),
    ("grpo", "data.path", "''", "hub name"),
    ("grpo", "data.limit", "0", "Read at most"),
    ("grpo", "data.max_prompt_tokens", "0", "number of tokens of a prompt"),
    ("grpo", "rewards", "[]", "weighted sum"),
    ("grpo", "rewards.0.timeout", "0", "the default is 60"),
    ("grpo", "evaluation.samples", "0", "the default is 1"),
    ("ppo", "gamma", "1.5", "the default is 1"),
    ("ppo", "gae_lambda", "-0.1", "the default is 0.95"),
    ("ppo", "beta", "-1", "the default is 0.05"),
    ("ppo", "critic.coefficient", "0", "the default is 0.5"),
    ("ppo", "critic.clip", "0", "no clipping"),
    ("ppo", "adaptive_kl.target", "0", "KL per response"),
    ("ppo", "target_kl", "0", "a batch's updates end"),
    ("ppo", "entropy_coef", "-1", "Weight of the policy's entropy"),
    ("dpo", "beta", "0", "the default is 0.1"),
    ("dpo", "label_smoothing", "0.5", "share of flipped labels"),
    ("dpo", "pairs_per_step", "0", "the default is 32"),
    ("dpo", "epochs", "0", "the default is 1"),
    ("sft", "examples_per_step", "0", "the default is 32"),
    ("sft", "steps", "0", "an alternative to epochs"),
    ("reward-model", "held_out_share", "1", "the default is 0.1"),
    ("reward-model", "center", "-1", "the default is 0.01"),
    ("sample", "samples", "0", "the default is 1"),
    ("pairs", "samples", "1", "the default is 8"),
    ("pairs", "minimum_gap", "-1", "Minimum reward gap"),
    ("label-steps", "completions", "0", "the default is 8"),
    ("label-steps", "separator", "''", "Text between two steps"),
    ("evaluate", "temperature", "0", "the default is 1"),
    ("evaluate", "rewards", "[]", "Rewards whose weighted sum"),
    ("compare", "seeds", "[-1]", "the default is [0]"),
    ("compare", "parallel", "-1", "Number of jobs that run in parallel"),
    ("compare", "methods", "[]", "Methods to compare"),
]
for _command, _key, _value, _remedy in _BOUNDS:
    _shown = {"''": '""', "[]": "[]", "GPU 0": '"GPU 0"', "[-1]": "-1"}.get(_value, _value)
    bad(
        f"{_command} {_key}={_value}",
        _command,
        "",
        f" = {_shown}:",
        f"argument `{_key}={_value}`",
        "must ",
        _remedy,
        settings=(f"{_key}={_value}",),
    )

bad("a beta of 1", "sft", "optimizer:\n  betas: [0.9, 1.0]\n", "betas.1 = 1.0",
    "sft.yaml:2", "must be less than 1", "the default is [0.9, 0.999]")
bad("three betas", "sft", "optimizer: {betas: [0.9, 0.9, 0.9]}\n", "betas", "sft.yaml:1",
    "at most 2", "the default is [0.9, 0.999]")
bad("an empty stop text", "grpo", "sampling: {stop: ['']}\n", 'stop.0 = ""', "grpo.yaml:1",
    "must be text that is not empty", "Texts that end a response")
bad("a stop text twice", "grpo", "sampling: {stop: [a, a]}\n", "'a'", "grpo.yaml:1",
    "occurs twice", "keep one")
bad("a stop token below 0", "grpo", "sampling: {stop_tokens: [-1]}\n", "-1", "grpo.yaml:1",
    "must be greater than or equal to 0", "Token ids that end a response")
bad("an unknown tracker", "grpo", "run: {trackers: [mlflow]}\n", '"mlflow"', "grpo.yaml:1",
    "must be 'tensorboard', 'wandb' or 'trackio'", "'tensorboard'")

# --- Values that cannot be together ---------------------------------------------------------------

bad("more minibatches than prompts", "grpo", "minibatches: 20\n", "minibatches = 20", "grpo.yaml:1",
    "more than the 16 groups", "lower it or raise prompts_per_step")
bad("more minibatches than prompts, PPO", "ppo", "minibatches: 65\n", "minibatches = 65",
    "ppo.yaml:1", "more than the 64 prompts", "lower it or raise prompts_per_step")
bad("greedy sampling for GRPO", "grpo", "sampling:\n  temperature: 0\n",
    "sampling.temperature = 0", "grpo.yaml:2", "with advantage 0", "raise it")
bad("greedy sampling for PPO", "ppo", "sampling: {temperature: 0}\n", "sampling.temperature = 0",
    "ppo.yaml:1", "explores nothing", "raise it")
bad("greedy sampling for pairs", "pairs", "sampling: {temperature: 0}\n",
    "sampling.temperature = 0", "pairs.yaml:1", "identical responses make no pairs", "raise it")
bad("greedy completions of steps", "label-steps", "sampling: {temperature: 0}\n",
    "completions = 8", "label-steps.yaml:", "would be the same", "raise it")
bad("labels of steps from a reward of steps", "label-steps", "rewards: [{function: steps}]\n",
    "rewards", "label-steps.yaml:1", "the labels come from whole solutions",
    "name a reward of the final answer")
bad("a vote of one sample", "evaluate", "vote: number\n", 'vote = "number"', "evaluate.yaml:1",
    "nothing to choose from", "set samples")
bad("an unknown answer to vote on", "evaluate", "vote: numbre\nsamples: 4\n", '"numbre"',
    "evaluate.yaml:1", "must be 'number', 'boxed' or file.py:function", "did you mean")
bad("a process reward that ranks steps", "evaluate",
    "samples: 4\nrerank: [{function: process_reward_model, arguments: {path: model}}]\n",
    "rerank", "evaluate.yaml:2", "scores steps", "set aggregate to minimum or product")
bad("a tagged format with one name", "grpo",
    "rewards: [{function: tags, arguments: {tags: think}}]\n", "'think'", "rewards.0 (tags)",
    "must be a list of names", "such as [think, answer]")
bad("a language without a code", "grpo",
    "rewards: [{function: language, arguments: {language: English}}]\n", "'English'",
    "rewards.0 (language)", "must be one of", "write an ISO 639-1 code")
bad("several greedy samples", "sample", "sampling: {temperature: 0}\nsamples: 2\n",
    "samples = 2", "sample.yaml:2", "would be the same", "set samples to 1")
bad("greedy sampling for online pairs", "dpo",
    "online:\n  data: {path: prompts.jsonl}\n  rewards: [{function: gsm8k}]\n"
    "  sampling: {temperature: 0}\n",
    "online.sampling.temperature = 0", "dpo.yaml:4", "would be equal and make no pair", "raise it",
    without=("data",))
bad("a KL correction without a KL term", "grpo", "kl_correction: true\nbeta: 0\n",
    "kl_correction = true", "grpo.yaml:1", "needs a KL term", "set beta above 0")
bad("a KL estimator without a gradient to the reference", "grpo", "kl: k1\n", 'kl = "k1"',
    "grpo.yaml:1", "does not pull towards the reference", "use k3")
bad("GSPO without its mean over sequences", "grpo", "surrogate: gspo\naggregation: token_mean\n",
    'aggregation = "token_mean"', "grpo.yaml:2", "gspo's loss is a mean over sequences",
    "use sequence_mean")
bad("process supervision with outcome rewards", "grpo",
    "supervision: process\nrewards: [{function: gsm8k}]\n", 'supervision = "process"',
    "grpo.yaml:1", "scores whole responses", "name one that scores steps")
bad("dynamic sampling with process supervision", "grpo",
    "dynamic_sampling: 2\nsupervision: process\n", "dynamic_sampling = 2", "grpo.yaml:1",
    "compares outcomes", "use supervision: outcome")
bad("leave-one-out with process supervision", "grpo",
    "advantage: leave_one_out\nsupervision: process\n", "leave_one_out", "grpo.yaml:1",
    "compares outcomes", "use supervision: outcome")
bad("a reward update without a learned reward", "grpo",
    "iterations: 2\nreward_update: {labeler: {function: gsm8k}}\n", "reward_update", "grpo.yaml:2",
    "rewards names 0 of them", "name exactly one")
bad("a reward update in a single iteration", "grpo",
    "reward_update:\n  labeler: {function: gsm8k}\n"
    "rewards: [{function: reward_model, arguments: {path: model}}]\n",
    "iterations is 1", "grpo.yaml:1", "between iterations", "leave reward_update out")
bad("a reward update with a schedule", "ppo",
    "reward_update:\n  labeler: {function: gsm8k}\n  optimizer: {schedule: cosine}\n", '"cosine"',
    "ppo.yaml:3", "is not known in advance", "use constant")
bad("a learned labeler", "ppo",
    "reward_update:\n  labeler: {function: reward_model, arguments: {path: model}}\n",
    '"reward_model"', "ppo.yaml:2", "cannot label for itself", "name a verifier")
bad("critic warm-up longer than the run", "ppo", "critic: {warmup_steps: 6}\nsteps: 5\n",
    "critic.warmup_steps = 6", "ppo.yaml:1", "there are only 5 steps", "lower it")
bad("a model for a shared critic", "ppo", "critic:\n  kind: shared\n  model: {path: model}\n",
    "critic.model", "ppo.yaml:3", "is a head on the actor", "leave critic.model out")
bad("warm-up of a shared critic", "ppo", "critic: {kind: shared, warmup_steps: 2}\n",
    "critic.warmup_steps = 2", "ppo.yaml:1", "train the actor's trunk", "use kind: separate")
bad("an adaptive KL coefficient that starts at 0", "ppo", "beta: 0\nadaptive_kl: {target: 1}\n",
    "beta = 0", "ppo.yaml:1", "would keep it 0", "start it above 0")
bad("no pairs and no prompts", "dpo", "", "data (preference pairs)", "dpo.yaml:",
    "give either data", "or online (sampled pairs)", without=("data",))
bad("pairs and prompts for DPO", "dpo",
    "online: {data: {path: prompts.jsonl}, rewards: [{function: reward.py:score}]}\n",
    "online (sampled pairs)", "dpo.yaml:", "give either", "data (preference pairs)")
bad("a margin without sigmoid", "dpo", "target_margin: 0.5\nloss: ipo\n", "target_margin = 0.5",
    "dpo.yaml:1", "goes with loss: sigmoid", "leave it out")
bad("smoothing without sigmoid", "dpo", "label_smoothing: 0.1\nloss: hinge\n",
    "label_smoothing = 0.1", "dpo.yaml:1", "goes with loss: sigmoid or robust", "leave it out")
bad("robust loss without label smoothing", "dpo", "loss: robust\n", 'loss = "robust"', "dpo.yaml:1",
    "needs label_smoothing above 0", "the share of flipped labels")
bad("evaluation without rewards for DPO", "dpo", "evaluation:\n  data: {path: held_out.jsonl}\n",
    "evaluation.rewards = []", "dpo.yaml:1", "pairs carry no reward", "name what measures quality")
bad("evaluation without rewards for SFT", "sft", "evaluation: {data: {path: held_out.jsonl}}\n",
    "evaluation.rewards = []", "sft.yaml:1", "carry no reward", "name what measures quality")
bad("both steps and epochs", "sft", "steps: 3\nepochs: 2\n", "steps = 3", "sft.yaml:1",
    "epochs is set too", "give one of them")
bad("fixed-length aggregation without a length", "sft", "aggregation: fixed_length\n",
    '"fixed_length"', "sft.yaml:1", "which is not set", "set it")
bad("KL without held-out prompts", "sft", "measure_kl: true\n", "measure_kl = true", "sft.yaml:1",
    "needs held-out prompts", "give evaluation")
bad("a minimum for a constant learning rate", "sft",
    "optimizer: {schedule: constant, min_lr_ratio: 0.1}\n", "optimizer.min_lr_ratio = 0.1",
    "sft.yaml:1", "a constant rate does not decay", "set schedule to linear or cosine")
bad("two lengths of a warm-up", "sft", "optimizer: {warmup_steps: 5, warmup_ratio: 0.1}\n",
    "optimizer.warmup_ratio = 0.1", "sft.yaml:1", "warmup_steps = 5 gives the length", "keep one")
bad("a start of no warm-up", "sft", "optimizer: {warmup_start_ratio: 0.1}\n",
    "optimizer.warmup_start_ratio = 0.1", "sft.yaml:1", "no warm-up to start",
    "set warmup_steps or warmup_ratio")
bad("two moments of RMSprop", "dpo", "optimizer: {kind: rmsprop, betas: [0.9, 0.95]}\n",
    "optimizer.betas", "dpo.yaml:1", "rmsprop has one decay rate", "alpha: set that instead")
bad("RMSprop's decay rate for AdamW", "dpo", "optimizer: {alpha: 0.9}\n",
    "optimizer.alpha = 0.9", "dpo.yaml:1", "goes with kind: rmsprop", "has betas: set these")
bad("a reward update with a share of steps", "ppo",
    "reward_update:\n  labeler: {function: gsm8k}\n  optimizer: {warmup_ratio: 0.1}\n",
    "reward_update.optimizer.warmup_ratio = 0.1", "ppo.yaml:3", "is not known in advance",
    "set optimizer.warmup_steps")
bad("pairs and steps for a reward model", "reward-model", "steps: {path: steps.jsonl}\n",
    "steps (a process model)", "reward-model.yaml:", "give either pairs or rankings",
    "only one of them")
bad("demonstrations for a process model", "reward-model",
    "steps: {path: steps.jsonl}\ndemonstrations: {path: data.jsonl}\n", "demonstrations",
    "reward-model.yaml:2", "whose zero is a probability", "leave it out", without=("pairs",))
bad("validation steps for an outcome model", "reward-model",
    "validation_steps: {path: steps.jsonl}\n", "validation_steps", "reward-model.yaml:1",
    "it goes with steps", "write validation_pairs")
bad("accuracy without held-out pairs", "reward-model", "evaluate_every: 5\nheld_out_share: 0\n",
    "evaluate_every = 5", "reward-model.yaml:1", "nothing is held out", "name validation data")
bad("an empty budget", "grpo", "run: {budget: {}}\n", "budget is empty", "grpo.yaml:1",
    "budget is empty", "give one of seconds")
bad("a jump below the factor of a monitor", "grpo",
    "run:\n  monitors:\n    gradient_norm: {jump: 5}\n", "gradient_norm.jump = 5", "grpo.yaml:3",
    "below factor", "raise jump")
bad("a minimum reward without rewards", "sample", "minimum_reward: 1\n", "minimum_reward = 1",
    "sample.yaml:1", "needs rewards", "name what scores")
bad("neither a model nor candidates", "pairs", "", "model (to sample the responses)", "pairs.yaml:",
    "give either model", "or candidates", without=("model", "rewards", "sampling"))
bad("sampling settings for candidates", "pairs",
    "samples: 4\ncandidates: [{response: texts, score: scores}]\n", "samples = 4", "pairs.yaml:1",
    "nothing is sampled", "leave it out", without=("model", "rewards", "sampling"))
bad("pairs without rewards", "pairs", "rewards: []\n", "rewards = []", "pairs.yaml:1",
    "it is empty", "name the rewards that rank")
bad("a revision of a directory", "sft", "model:\n  path: model\n  revision: main\n",
    'model.revision = "main"', "sft.yaml:3", "a local directory, which has none",
    "leave revision out")
bad("CUDA graphs on a CPU", "grpo", "model:\n  path: model\n  device: cpu\n  cuda_graphs: true\n",
    "model.cuda_graphs = true", "grpo.yaml:4", "device cpu has no CUDA graphs",
    "leave cuda_graphs out")
bad("CUDA graphs for a reward model", "reward-model",
    "model:\n  path: model\n  device: cuda\n  cuda_graphs: true\n", "model.cuda_graphs = true",
    "reward-model.yaml:4", "does not sample", "leave it out")
bad("CUDA graphs for a critic", "ppo",
    "critic:\n  model:\n    path: model\n    cuda_graphs: true\n",
    "critic.model.cuda_graphs = true", "ppo.yaml:4", "does not sample", "leave it out")
bad("CUDA graphs for a reference", "evaluate",
    "reference:\n  path: model\n  cuda_graphs: true\n", "reference.cuda_graphs = true",
    "evaluate.yaml:3", "does not sample", "leave it out")
bad("long prompts dropped without a limit", "grpo",
    "data: {path: prompts.jsonl, long_prompts: drop}\n", 'long_prompts = "drop"', "grpo.yaml:1",
    "needs a limit", "set `max_prompt_tokens`")
bad("long responses truncated without a limit", "sft",
    "data: {path: demos.jsonl, long_responses: truncate}\n", '"truncate"', "sft.yaml:1",
    "needs a limit", "set `max_response_tokens`")
bad("two sources of prompts", "grpo",
    "data: {path: prompts.jsonl, template: '{prompt}', columns: {prompt: prompt}}\n", "template",
    "grpo.yaml:1", "both give the prompt", "keep one")
bad("a template with a lone brace", "grpo", "data: {path: prompts.jsonl, template: 'a } b'}\n",
    "`}`", "grpo.yaml:1", "names no column", "{{ or }} for a brace")
bad("an unused column mapping", "sft", "data: {path: demos.jsonl, columns: {answer: x}}\n",
    "answer", "sft.yaml:1", "which this section does not use", "it may name completion")
bad("an output with another suffix", "sample", "output: out.csv\n", "out.csv", "sample.yaml:1",
    "ends in .jsonl", "out.jsonl")
bad("an evaluation output with another suffix", "evaluate", "output: out.txt\n", "out.txt",
    "evaluate.yaml:1", "ends in .json", "out.json")
_METHOD = "{name: b, stages: [{command: dpo, settings: {data: {path: pairs.jsonl}}}]}"
bad("a method that trains no policy", "compare",
    "methods: [{name: a, stages: [{command: pairs}]}]\n", "pairs", "compare.yaml:1",
    "trains no policy", "end the method with one of sft, ppo, dpo, grpo")
bad("two methods of one name", "compare", f"methods: [{_METHOD}, {_METHOD}]\n", "b",
    "compare.yaml:1", "two methods are called", "give one another name")
bad("a stage name with a path", "compare",
    "methods:\n- name: a\n  stages: [{command: grpo, name: ../up}]\n", "'../up'", "compare.yaml:3",
    "cannot be a directory name", "use letters, digits")
bad("seeds twice", "compare", "seeds: [1, 1]\n", "[1, 1]", "compare.yaml:1", "appears twice",
    "remove one")
bad("gradient noise of one batch", "compare", "credit: 1\n", "credit = 1", "compare.yaml:1",
    "1 batch shows no noise", "write at least 2")
bad("a stage's unknown key", "compare",
    "methods: [{name: a, stages: [{command: grpo, settings: {betta: 1}}]}]\n", "betta",
    "a/seed-0/grpo", "is not a known key", "did you mean `beta`?", early=False)
bad("an unknown placeholder", "compare",
    "methods: [{name: a, stages: [{command: grpo, settings: {beta: '${bet}'}}]}]\n", "${bet}",
    "method a", "${bet}", "use one of ${seed}", early=False)

bad("asynchronous GRPO without an importance sampling cap", "grpo", "asynchronous: true\n",
    "asynchronous = true", "grpo.yaml:1", "responses are then one step old",
    "set importance_sampling_cap, 2")
bad("asynchronous PPO with one step", "ppo",
    "asynchronous: true\nimportance_sampling_cap: 2\nsteps: 1\n", "asynchronous = true",
    "ppo.yaml:1", "no second step", "take more steps, or leave it out")

bad("sequence weights without a cap", "ppo", "importance_sampling: sequence_mask\n",
    'importance_sampling = "sequence_mask"', "ppo.yaml:1", "needs a bound of the weights",
    "set importance_sampling_cap, 2 is usual")
bad("a cap that masks on-policy responses", "grpo",
    "importance_sampling: token_mask\nimportance_sampling_cap: 0.9\n",
    "importance_sampling_cap = 0.9", "grpo.yaml:2", "token_mask leaves out what is above it",
    "raise it above 1")
bad("one reward normalized by itself", "grpo", "reward_aggregation: normalize_then_sum\n",
    'reward_aggregation = "normalize_then_sum"', "grpo.yaml:1", "there is no sum", "add another")
bad("a decay of 1 of the moving average", "ppo", "ema_decay: 1\n", "ema_decay = 1", "ppo.yaml:1",
    "less than 1", "moving average of the actor's weights")

# --- Rewards --------------------------------------------------------------------------------------

bad("rewards of weight 0", "grpo", "rewards: [{function: gsm8k, weight: 0}]\n",
    "rewards", "grpo.yaml:1", "every weight is 0", "another weight")
bad("rewards of one name", "grpo", "rewards: [{function: gsm8k}, {function: gsm8k}]\n", "'gsm8k'",
    "grpo.yaml:1", "2 rewards are called", "its own 'name'")
bad("a learned reward without a path", "ppo", "rewards:\n- function: reward_model\n",
    "rewards.0.arguments", "ppo.yaml:2", "needs the path of its model", "write `arguments:")
bad("a learned reward's unknown argument", "ppo",
    "rewards:\n- {function: reward_model, arguments: {path: model, pth: x}}\n", "`pth`",
    "ppo.yaml:2", "takes no", "did you mean 'path'?")
bad("a learned reward's wrong choice", "ppo",
    "rewards:\n- {function: process_reward_model, arguments: {path: model, aggregate: sum}}\n",
    '"sum"', "ppo.yaml:2", "it must be 'none', 'product' or 'minimum'", "'product'")
bad("a reward in the main thread while sampling", "grpo",
    "rewards: [{function: server, timeout: null, while_sampling: true}]\n", "while_sampling = true",
    "grpo.yaml:1", "calls the function in the main thread", "set a timeout")
bad("a reward that is none", "grpo", "rewards: [{function: gsm8l}]\n", "'gsm8l'", "rewards.0",
    "is not a built-in reward", "did you mean 'gsm8k'?")
bad("a reward's file that is not there", "grpo", "rewards: [{function: rewards.py:score}]\n",
    "'rewards.py'", "rewards.0", "no such file", "write a path relative to")
bad("a reward's file without the function", "grpo", "rewards: [{function: reward.py:scores}]\n",
    "'scores'", "rewards.0", "defines no", "did you mean 'score'?")
bad("a reward without a name", "grpo", "rewards: [{function: 'reward.py:'}]\n", "'reward.py:'",
    "rewards.0", "names no function", "write 'file.py:function'")
bad("a reward file with a syntax error", "grpo", "", "reward.py", "reward.py:1", "not valid Python",
    "correct the file", files={"reward.py": "def score(responses:\n  return"})
bad("a reward without its argument", "grpo", "rewards: [{function: length}]\n", "'limit'",
    "rewards.0 (length)", "it needs", "set it in 'arguments'")
bad("a reward's unknown argument", "grpo", "rewards: [{function: gsm8k, arguments: {marker: x}}]\n",
    "'marker'", "rewards.0 (gsm8k)", "does not accept", "did you mean 'markers'?")
bad("a reward's missing column", "grpo", "rewards: [{function: gsm8k}]\n", "'answer'",
    "rewards.0 (gsm8k), on data", "needs a data column", "name one in 'columns:",
    files={"prompts.jsonl": '{"prompt": "a", "gold": "#### 1"}\n'})
bad("a held-out file without the answer", "grpo",
    "rewards: [{function: gsm8k}]\nevaluation: {data: {path: held_out.jsonl}}\n", "'answer'",
    "on evaluation.data", "needs a data column", "name one in 'columns:",
    files={"held_out.jsonl": '{"prompt": "a"}\n'})
bad("an API key in the arguments", "grpo",
    "rewards:\n- function: reward.py:score\n  arguments: {api_key: abcdefgh12345}\n", "`api_key`",
    "grpo.yaml:3", "looks like a secret", "put it into an environment variable")
bad("a value that looks like a token", "grpo", "", "`service`",
    "argument `rewards.0.arguments.service=…`", "looks like a secret",
    "put it into an environment variable",
    settings=("rewards.0.arguments.service=hf_abcdefghijklmnopqrst",))
bad("a password in a URL", "ppo",
    "rewards:\n- {function: reward.py:score, arguments: {url: 'https://me:pw@host/x'}}\n", "`url`",
    "ppo.yaml:2", "looks like a secret", "put it into an environment variable")
