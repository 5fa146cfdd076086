"""Monitors: rules over a run's metrics that speak up while it goes on.

A reward curve that rises says little; what it may hide is watched here. An alarm is raised when
its condition begins, not at every step, and again only after the condition was gone for a while.
When a condition holds is decided in ``monitor_rules`` and ``monitor_hacking``, limits stand in
``monitor_config``. Left out: showing, storing and obeying alarms, which is for whoever observes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trivium.monitoring import rules
from trivium.monitoring.history import Memory, View
from trivium.monitoring.monitor_config import MonitorConfig, MonitorsConfig, NonFiniteConfig
from trivium.monitoring.reward_hacking import remember_reward, reward_hacking
from trivium.monitoring.rules import Finding

__all__ = ["MONITORS", "Alarm", "Monitor", "Monitors", "MonitorsConfig", "table"]


@dataclass(frozen=True)
class Alarm:
    """What a monitor has to say.

    Attributes:
        monitor: its name in the configuration.
        step: the training step, or the one after which was evaluated.
        metric: what it watched, as in ``metrics.jsonl`` or ``evaluation.jsonl``.
        value: the metric's value, over a window where the monitor has one.
        limit: what the value passed.
        seen: what happened, in numbers.
        why: why that matters.
        remedy: what to try.
        stops: whether the run is to stop.
    """

    monitor: str
    step: int
    metric: str
    value: float
    limit: float
    seen: str
    why: str
    remedy: str
    stops: bool

    @property
    def message(self) -> str:
        """What was seen and what to try, for a terminal."""
        return f"{self.monitor}, step {self.step}: {self.seen}. {self.remedy}"

    def fields(self) -> dict[str, Any]:
        """All of it, for the run's events."""
        return asdict(self)


AttentionSpec = Callable[[Any, View], Finding | None]


@dataclass(frozen=True)
class Monitor:
    """One monitor: what it watches, what its alarm says, and its rules.

    Attributes:
        watches: the condition in words, for the docs.
        why: why it matters, a sentence or two.
        remedy: settings to try, one sentence.
        after_step: judges a training step's metrics.
        after_evaluation: judges a held-out evaluation.
    """

    watches: str
    why: str
    remedy: str
    after_step: AttentionSpec | None = None
    after_evaluation: AttentionSpec | None = None


MONITORS = {
    "non_finite": Monitor(
        "any metric or evaluation that is NaN or infinite",
        "One NaN spreads to all weights with the next update.",
        "Lower optimizer.learning_rate, look for extreme rewards, or set model.dtype: float32.",
    ),
    "kl": Monitor(
        "KL to the reference, per response and per token; held-out where steps measure none",
        "The policy has left the region in which the reward was learned and the reference keeps "
        "text fluent; what the reward says there is worth little.",
        "Raise beta (PPO: or set adaptive_kl), lower optimizer.learning_rate, or stop earlier.",
        rules.kl,
        rules.held_out_kl,
    ),
    "kl_old": Monitor(
        "KL from the sampling policy that one step's updates made",
        "Beyond the reach of its samples an update is not guided by them: one step can undo a run.",
        "Lower optimizer.learning_rate, epochs or minibatches, or set target_kl (PPO).",
        rules.kl_old,
    ),
    "entropy": Monitor(
        "entropy against the run's start, and against a floor",
        "A policy without entropy samples one answer: nothing is explored, groups have equal "
        "rewards, and learning ends.",
        "Raise clip_high (DAPO: 0.28) or beta, set entropy_coef (PPO), or lower "
        "optimizer.learning_rate.",
        rules.entropy,
    ),
    "length_growth": Monitor(
        "response length against the run's start; held-out where steps sample nothing",
        "Rewards often pay for length, knowingly or not, and every step costs more.",
        "Add the built-in reward length, set aggregation: fixed_length (GRPO, PPO) or "
        "length_normalized (DPO), or raise run.monitors.length_growth.factor where it is meant.",
        rules.length_growth,
        rules.length_growth,
    ),
    "length_collapse": Monitor(
        "response length against the run's start; held-out where steps sample nothing",
        "Answers that shrink often drop the work and keep what scores.",
        "Check whether rewards punish length, or a KL term in the reward (PPO: beta) does; set "
        "aggregation: token_mean or fixed_length, or lower beta.",
        rules.length_collapse,
        rules.length_collapse,
    ),
    "truncated": Monitor(
        "share of responses that the length limit ends",
        "A response that was cut off is scored unfinished, and the policy is not taught to end.",
        "Raise sampling.max_tokens, set mask_truncated (GRPO), or, where texts have no end by "
        "design, run.monitors.truncated.action: off.",
        rules.truncated,
    ),
    "empty": Monitor(
        "share of responses without any text",
        "A response that ends at once earns what nothing earns, and teaches the policy to end.",
        "Check the chat template and prompts (`trivium sample` shows responses), that the model "
        "was fine-tuned to answer, and that no reward pays for silence.",
        rules.empty,
    ),
    "equal_rewards": Monitor(
        "share of groups (online DPO: prompts) whose responses all got the same reward",
        "Such groups have no advantage and make no pairs: their samples are paid for and teach "
        "nothing.",
        "Choose prompts that are neither too easy nor too hard, raise responses_per_prompt, set "
        "dynamic_sampling (GRPO), or reward in finer grades.",
        rules.equal_rewards,
    ),
    "critic": Monitor(
        "the critic's explained variance, after a grace period",
        "Advantages from a critic that is worse than a constant are noisier than without one.",
        "Set critic.warmup_steps or start from a reward model (critic.model), change "
        "critic.optimizer.learning_rate, or take lam: 1.0.",
        rules.critic,
    ),
    "clip_fraction": Monitor(
        "share of tokens whose gradient clipping takes",
        "Most of the batch no longer teaches, and the rest pulls from far off its samples.",
        "Lower optimizer.learning_rate, epochs or minibatches, or widen clip_low and clip_high.",
        rules.clip_fraction,
    ),
    "ratio": Monitor(
        "largest ratio π/π_old of a step",
        "Where Â < 0, clipping does not bound a large ratio: single tokens then rule the gradient.",
        "Lower optimizer.learning_rate or epochs, or set surrogate: gspo or cispo (GRPO).",
        rules.ratio,
    ),
    "sampler_difference": Monitor(
        "largest difference between the sampler's and the trainer's log-prob of a token",
        "Samples then come from another policy than the one that is trained, and gradients are "
        "biased.",
        "Sample in the trainer's precision (model.dtype: float32), check that the sampler holds "
        "the trained weights, or set importance_sampling_cap: 2; lower optimizer.learning_rate where they "
        "are sampled ahead (asynchronous).",
        rules.sampler_difference,
    ),
    "chosen_logprob": Monitor(
        "the chosen responses' implicit reward, against its start and the margin",
        "A margin can grow while both responses fall: the probability they lose goes to responses "
        "that nobody preferred.",
        "Set sft_coefficient (0.1 to 1), raise beta, lower optimizer.learning_rate or epochs, or "
        "train on pairs that differ more.",
        rules.chosen_logprob,
    ),
    "preferences_learned": Monitor(
        "preference accuracy near 1 while pairs have almost no gradient",
        "Nothing is left to learn from these pairs; further steps only move the policy away.",
        "Stop here (fewer epochs), raise beta, set label_smoothing, or bring new pairs (online).",
        rules.preferences_learned,
    ),
    "gradient_norm": Monitor(
        "gradient norm against the median of the steps before",
        "Exploding gradients mean that a step is ruled by a few extreme samples, and often come "
        "before NaN.",
        "Lower optimizer.learning_rate or optimizer.max_grad_norm, set optimizer.warmup_steps, or "
        "look for extreme rewards and log-ratios at this step.",
        rules.gradient_norm,
    ),
    "fallbacks": Monitor(
        "responses whose reward failed",
        "A fallback value is no judgment: where failing pays, the policy learns to make the "
        "reward fail.",
        "Look at the reward's error on such a response, raise its timeout, or choose a lower "
        "fallback.",
        rules.fallbacks,
    ),
    "out_of_memory": Monitor(
        "micro-batches that did not fit the memory and were done in halves",
        "The gradient is the same, but every failed try costs the time of a pass.",
        "Lower tokens_per_micro_batch, or set model.gradient_checkpointing: true.",
        rules.out_of_memory,
    ),
    "reward_hacking": Monitor(
        "training reward rising while held-out quality, which it does not see, falls",
        "The policy earns what the reward measures instead of what it stands for, and the reward's "
        "own curve will not show it.",
        "Raise beta or lower optimizer.learning_rate, cap the reward, weigh in what fell (such as "
        "repetition), or keep the last model before the fall.",
        remember_reward,
        reward_hacking,
    ),
}
"""All monitors, by their names in the configuration."""


class Monitors:
    """Watches one run: told of every step and evaluation, it answers with the alarms that begin."""

    def __init__(self, config: MonitorsConfig) -> None:
        self.config = config
        self._on: dict[str, MonitorConfig] = {
            name: limits for name in MONITORS if (limits := getattr(config, name)).action != "off"
        }
        self._memories = {name: Memory() for name in self._on}

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """The alarms that begin with the metrics of a training step."""
        return self._judge(step, metrics, lambda monitor: monitor.after_step)

    def evaluated(self, step: int, record: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that begin with an evaluation after a step (0: before the first).

        What is no number in the record (absent, null, a table) is passed over.
        """
        return self._judge(step, record, lambda monitor: monitor.after_evaluation)

    def state_dict(self) -> dict[str, Any]:
        """Everything remembered, as JSON can hold it."""
        return {name: memory.state_dict() for name, memory in self._memories.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; a monitor that was off then, or is new, begins afresh."""
        self._memories |= {name: Memory.of(state[name]) for name in self._on if name in state}

    def _judge(
        self,
        step: int,
        record: Mapping[str, Any],
        rule_of: Callable[[Monitor], AttentionSpec | None],
    ) -> list[Alarm]:
        numbers = {name: float(value) for name, value in record.items() if _is_number(value)}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        alarms = []
        for name, limits in self._on.items():
            if isinstance(limits, NonFiniteConfig):
                finding = _non_finite(numbers)
            else:
                rule = rule_of(MONITORS[name])
                finding = rule and rule(limits, View(step, finite, self._memories[name]))
            if finding and self._memories[name].begins(
                finding.holds, step, self.config.again_after
            ):
                alarms.append(_alarm(name, step, finding, stops=limits.action == "stop"))
        return alarms


def table() -> str:
    """The monitors with their defaults as a Markdown table, for the docs."""
    rows = ["| monitor | watches | defaults | why | what to try |", "|---|---|---|---|---|"]
    config = MonitorsConfig()
    for name, monitor in MONITORS.items():
        limits = getattr(config, name).model_dump(exclude={"action"})
        shown = ", ".join(f"`{key}: {value:g}`" for key, value in limits.items())
        rows.append(
            f"| `{name}` | {monitor.watches} | {shown} | {monitor.why} | {monitor.remedy} |"
        )
    return "\n".join(rows) + "\n"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _non_finite(numbers: Mapping[str, float]) -> Finding | None:
    if not numbers:
        return None
    wrong = [name for name, value in numbers.items() if not math.isfinite(value)]
    seen = f"not finite: {', '.join(f'{name} = {numbers[name]}' for name in wrong)}"
    return Finding(bool(wrong), wrong[0] if wrong else "", float(len(wrong)), 0.0, seen)


def _alarm(name: str, step: int, finding: Finding, *, stops: bool) -> Alarm:
    monitor = MONITORS[name]
    return Alarm(
        monitor=name,
        step=step,
        metric=finding.metric,
        value=finding.value,
        limit=finding.limit,
        seen=finding.seen,
        why=monitor.why,
        remedy=monitor.remedy,
        stops=stops,
    )
