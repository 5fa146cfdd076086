"""Monitors: rules over a run's metrics that raise alarms during the run.

A rising reward curve can hide a failing run; monitors check the other metrics. An alarm is raised
when its condition first holds, not at every step, and again only after the condition has not held
for some steps. The conditions are in ``rules`` and ``reward_hacking``, the limits in
``monitor_config``. Showing, storing and acting on alarms is left to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trivium.monitoring import rules, significance
from trivium.monitoring.history import MetricHistory, MonitorState
from trivium.monitoring.monitor_config import MonitorConfig, MonitorsConfig, NonFiniteConfig
from trivium.monitoring.reward_hacking import record_reward, reward_hacking
from trivium.monitoring.rules import Finding

__all__ = ["MONITORS", "Alarm", "Monitor", "Monitors", "MonitorsConfig", "table"]


@dataclass(frozen=True)
class Alarm:
    """One alarm of a monitor.

    Attributes:
        monitor: name of the monitor in the configuration.
        step: training step, or the step after which the evaluation ran.
        metric: metric that was compared, as in ``metrics.jsonl`` or ``evaluation.jsonl``.
        value: value of the metric, over a window if the monitor has one.
        limit: limit that the value passed.
        seen: observation in words and numbers.
        why: why the observation matters.
        remedy: settings to try.
        stops: whether the run stops.
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
        """Observation and remedy in one line, for a terminal."""
        return f"{self.monitor}, step {self.step}: {self.seen}. {self.remedy}"

    def fields(self) -> dict[str, Any]:
        """Return all attributes, for the run's events."""
        return asdict(self)


Rule = Callable[[Any, MetricHistory], Finding | None]
"""Function that judges a metric history by the monitor's configuration."""


@dataclass(frozen=True)
class Monitor:
    """One monitor: its condition, the texts of its alarm, and its rules.

    Attributes:
        watches: the condition in words, for the docs.
        why: why the condition matters, in one or two sentences.
        remedy: settings to try, in one sentence.
        after_step: rule that judges the metrics of a training step.
        after_evaluation: rule that judges a held-out evaluation.
        after_reward_update: rule that judges an update of the learned reward.
    """

    watches: str
    why: str
    remedy: str
    after_step: Rule | None = None
    after_evaluation: Rule | None = None
    after_reward_update: Rule | None = None


MONITORS = {
    "non_finite": Monitor(
        "any metric or evaluation value that is NaN or infinite",
        "One NaN spreads to all weights with the next update.",
        "Lower optimizer.learning_rate, look for extreme rewards, or set model.dtype: float32.",
    ),
    "kl": Monitor(
        "KL to the reference, per response and per token; held-out KL if training steps log none",
        "The policy has left the region in which the reward was learned and in which the "
        "reference keeps text fluent. The reward is unreliable there.",
        "Raise beta (PPO: or set adaptive_kl), lower optimizer.learning_rate, or stop earlier.",
        rules.kl,
        rules.held_out_kl,
    ),
    "kl_old": Monitor(
        "KL from the sampling policy after one step's updates",
        "Samples say little about a policy this far from the one that drew them. One such step "
        "can ruin a run.",
        "Lower optimizer.learning_rate, epochs or minibatches, or set target_kl (PPO).",
        rules.kl_old,
    ),
    "entropy": Monitor(
        "entropy relative to the run's first step, and an absolute floor",
        "A policy without entropy always samples the same answer. Exploration stops, groups have "
        "equal rewards, and learning ends.",
        "Raise clip_high (DAPO: 0.28) or beta, set entropy_coef (PPO), or lower "
        "optimizer.learning_rate.",
        rules.entropy,
    ),
    "length_growth": Monitor(
        "response length relative to the run's first step; held-out length if training samples "
        "nothing",
        "Rewards often favor length without intending to, and long responses make every step "
        "slower.",
        "Add the built-in reward length, set aggregation: fixed_length (GRPO, PPO) or "
        "length_normalized (DPO), or raise run.monitors.length_growth.factor if longer responses "
        "are intended.",
        rules.length_growth,
        rules.length_growth,
    ),
    "length_collapse": Monitor(
        "response length relative to the run's first step; held-out length if training samples "
        "nothing",
        "Responses that shrink often leave out the reasoning and keep only the part that is "
        "scored.",
        "Check whether the rewards, or a KL term in the reward (PPO: beta), punish length. Set "
        "aggregation: token_mean or fixed_length, or lower beta.",
        rules.length_collapse,
        rules.length_collapse,
    ),
    "truncated": Monitor(
        "share of responses that reach the length limit",
        "A truncated response is scored unfinished, and the policy does not learn to end its "
        "responses.",
        "Raise sampling.max_tokens or set mask_truncated (GRPO). If texts have no end by design, "
        "set run.monitors.truncated.action: off.",
        rules.truncated,
    ),
    "empty": Monitor(
        "share of responses without any text",
        "An empty response gets whatever the reward gives to empty text, and teaches the policy "
        "to end at once.",
        "Check the chat template and the prompts (`trivium sample` shows responses), that the "
        "model was fine-tuned to answer, and that no reward favors empty responses.",
        rules.empty,
    ),
    "equal_rewards": Monitor(
        "share of groups (online DPO: prompts) whose responses all have the same reward",
        "Such groups have zero advantage and give no pairs: sampling them costs time and teaches "
        "nothing.",
        "Choose prompts that are neither too easy nor too hard, raise responses_per_prompt, set "
        "dynamic_sampling (GRPO), or use a reward with finer grades.",
        rules.equal_rewards,
    ),
    "critic": Monitor(
        "explained variance of the critic, after a grace period",
        "Advantages from a critic that is worse than a constant are noisier than advantages "
        "without a critic.",
        "Set critic.warmup_steps or start from a reward model (critic.model), change "
        "critic.optimizer.learning_rate, or set gae_lambda: 1.0.",
        rules.critic,
    ),
    "clip_fraction": Monitor(
        "share of tokens whose gradient clipping removes (cispo: whose weight it bounds)",
        "Clipped tokens have no gradient or a bounded one, and the rest of the batch is far from "
        "the policy that sampled it.",
        "Lower optimizer.learning_rate, epochs or minibatches, or widen clip_low and clip_high.",
        rules.clip_fraction,
    ),
    "ratio": Monitor(
        "largest ratio π/π_old of a step",
        "If Â < 0, clipping does not bound a large ratio, and single tokens dominate the gradient.",
        "Lower optimizer.learning_rate or epochs, or set surrogate: gspo or cispo (GRPO).",
        rules.ratio,
    ),
    "sampler_difference": Monitor(
        "largest difference between the sampler's and the trainer's log-prob of a token",
        "The samples come from a different policy than the one that is trained, so gradients are "
        "biased.",
        "Set importance_sampling_cap: 2, check that the sampler holds the trained weights, or "
        "compute in model.dtype: float32 if it is bfloat16. If the run is asynchronous, lower "
        "optimizer.learning_rate.",
        rules.sampler_difference,
    ),
    "chosen_logprob": Monitor(
        "implicit reward of the chosen responses, relative to the run's first step and to the "
        "margin",
        "The margin can grow while both responses become less likely. The probability they lose "
        "goes to responses that no annotator preferred.",
        "Set sft_coefficient (0.1 to 1), raise beta, lower optimizer.learning_rate or epochs, or "
        "train on pairs that differ more.",
        rules.chosen_logprob,
    ),
    "preferences_learned": Monitor(
        "preference accuracy near 1 while the pairs have almost no gradient",
        "Nothing is left to learn from these pairs. Further steps only move the policy away from "
        "the reference.",
        "Stop now (fewer epochs), raise beta, set label_smoothing, or add new pairs (online).",
        rules.preferences_learned,
    ),
    "gradient_norm": Monitor(
        "gradient norm relative to the median of the steps before",
        "If gradients explode, a few extreme samples dominate the step. NaN often follows.",
        "Lower optimizer.learning_rate or optimizer.max_grad_norm, set optimizer.warmup_steps, or "
        "look for extreme rewards and log-ratios at this step.",
        rules.gradient_norm,
    ),
    "lost_updates": Monitor(
        "share of the weights that an optimizer step changes",
        "An update that is smaller than half the distance to the next number rounds to nothing: "
        "the run costs what training costs, and trains little.",
        "Raise optimizer.learning_rate, set model.dtype: float32, or leave "
        "optimizer.half_precision out.",
        rules.lost_updates,
    ),
    "fallbacks": Monitor(
        "number of responses whose reward function failed",
        "A fallback value is not a judgment. If it is higher than a real score, the policy learns "
        "to make the reward function fail.",
        "Look at the reward function's error on such a response, raise its timeout, or choose a "
        "lower fallback.",
        rules.fallbacks,
    ),
    "out_of_memory": Monitor(
        "number of micro-batches that ran out of memory and were split in half",
        "The gradient is the same, but every failed attempt costs the time of a forward and "
        "backward pass.",
        "Lower tokens_per_micro_batch, or set model.gradient_checkpointing: true.",
        rules.out_of_memory,
    ),
    "reward_hacking": Monitor(
        "a rising training reward while held-out quality falls",
        "The policy optimizes what the reward measures instead of what the reward is meant to "
        "measure. The reward curve does not show the difference.",
        "Raise beta or lower optimizer.learning_rate, cap the reward, add a reward for the "
        "quality that fell (such as repetition), or keep the last model before the fall.",
        record_reward,
        reward_hacking,
    ),
    "learned_reward": Monitor(
        "accuracy of the learned reward on the policy's own responses, before each reward_update",
        "The policy is optimized for a reward that says no more about its responses than a coin.",
        "Stop, and train the reward model on more and fresher examples: lower reward_update.every, "
        "raise reward_update.examples or epochs, or raise beta so that the policy stays closer.",
        after_reward_update=significance.learned_reward,
    ),
    "held_out_quality": Monitor(
        "held-out reward at each prompt, relative to the best evaluation",
        "The policy is now worse than it was, whatever the training reward says.",
        "Keep the best model (run.checkpoints.best: greedy), stop earlier, lower "
        "optimizer.learning_rate, or raise beta.",
        after_evaluation=significance.held_out_quality,
    ),
    "reward_fall": Monitor(
        "slope of the training reward over the last steps",
        "The updates lower what they should raise: the gradient is noise, steps are too large, or "
        "the learned reward changes faster than the policy follows.",
        "Lower optimizer.learning_rate or epochs, raise prompts_per_step, or update the learned "
        "reward less often (reward_update.every).",
        significance.reward_fall,
    ),
}
"""All monitors by their names in the configuration."""


class Monitors:
    """Monitors of one run.

    Call `observe` after every step and `evaluated` after every evaluation; both return the alarms
    that begin.

    Args:
        config: limits and actions.
        half_precision: whether the trained weights are bfloat16, whose rounding is no fault.
    """

    def __init__(self, config: MonitorsConfig, *, half_precision: bool = False) -> None:
        self.config, self.half_precision = config, half_precision
        self._enabled: dict[str, MonitorConfig] = {
            name: limits for name in MONITORS if (limits := getattr(config, name)).action != "off"
        }
        self._states = {name: MonitorState() for name in self._enabled}

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Return the alarms that begin with the metrics of a training step."""
        return self._apply_rules(step, metrics, lambda monitor: monitor.after_step)

    def evaluated(
        self, step: int, record: Mapping[str, Any], outcomes: Mapping[str, Any] | None = None
    ) -> list[Alarm]:
        """Return the alarms that begin with an evaluation after a step (0: before the first).

        Values of the record that are not numbers (absent, null, a table) are ignored. ``outcomes``
        are the rewards of the responses by prompt, as in ``outcomes.jsonl``.
        """
        return self._apply_rules(step, record, lambda monitor: monitor.after_evaluation, outcomes)

    def event(self, kind: str, step: int, fields: Mapping[str, Any]) -> list[Alarm]:
        """Return the alarms that begin with an event: the update of a learned reward."""
        if kind != "reward_update":
            return []
        measured = {k: v for k, v in fields.items() if _is_number(v) and math.isfinite(v)}
        return self._apply_rules(step, measured, lambda monitor: monitor.after_reward_update)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all monitors as JSON values."""
        return {name: state.state_dict() for name, state in self._states.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state. A monitor that is new, or was off when it was saved, starts empty."""
        self._states |= {
            name: MonitorState.from_state_dict(state[name])
            for name in self._enabled
            if name in state
        }

    def _apply_rules(
        self,
        step: int,
        record: Mapping[str, Any],
        select_rule: Callable[[Monitor], Rule | None],
        outcomes: Mapping[str, Any] | None = None,
    ) -> list[Alarm]:
        numbers = {name: float(value) for name, value in record.items() if _is_number(value)}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        alarms = []
        for name, limits in self._enabled.items():
            state = self._states[name]
            if isinstance(limits, NonFiniteConfig):
                finding = _non_finite(numbers)
            else:
                rule = select_rule(MONITORS[name])
                history = MetricHistory(
                    step, finite, state, half_precision=self.half_precision, outcomes=outcomes
                )
                finding = rule and rule(limits, history)
            if finding and state.should_raise(finding.holds, step, self.config.again_after):
                alarms.append(_alarm(name, step, finding, stops=limits.action == "stop"))
        return alarms


def table() -> str:
    """Return the monitors with their defaults as a Markdown table for the docs."""
    rows = ["| monitor | watches | defaults | why | what to try |", "|---|---|---|---|---|"]
    config = MonitorsConfig()
    for name, monitor in MONITORS.items():
        limits = getattr(config, name).model_dump(exclude={"action"})
        defaults = ", ".join(f"`{key}: {value:g}`" for key, value in limits.items())
        rows.append(
            f"| `{name}` | {monitor.watches} | {defaults} | {monitor.why} | {monitor.remedy} |"
        )
    return "\n".join(rows) + "\n"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _non_finite(numbers: Mapping[str, float]) -> Finding | None:
    if not numbers:
        return None
    names = [name for name, value in numbers.items() if not math.isfinite(value)]
    seen = f"not finite: {', '.join(f'{name} = {numbers[name]}' for name in names)}"
    return Finding(bool(names), names[0] if names else "", float(len(names)), 0.0, seen)


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
