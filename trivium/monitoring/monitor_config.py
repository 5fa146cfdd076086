"""Configuration of the monitors: limits, windows, and the action of an alarm.

The defaults raise no alarm in healthy runs (docs/monitors.md has the measurements). Windows count
the training steps that log the metric. The conditions are in ``monitoring.rules``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from trivium.config.base import Configuration, Conflict


class MonitorConfig(Configuration):
    """Setting that every monitor has."""

    action: Literal["warn", "stop", "off"] = "warn"
    """Action of an alarm: warn logs it, stop also ends the run, off disables the monitor."""


class NonFiniteConfig(MonitorConfig):
    """Metrics that are NaN or infinite. A single one raises the alarm."""


class KLConfig(MonitorConfig):
    """KL to the reference. The alarm is raised if both limits are passed.

    A limit per response alone would flag long responses, whose log-ratios add up over thousands of
    tokens. A limit per token alone would flag a change of style in ten tokens. Adaptive controllers
    after Ziegler et al. 2019 target single-digit nats per response. Gao et al. 2022 show that
    quality falls as the distance grows further.
    """

    limit: float = Field(default=10.0, gt=0)
    """Largest KL in nats per response."""
    per_token: float = Field(default=0.1, gt=0)
    """Largest KL in nats per token, for long responses: 100 nats over 1000 tokens."""
    window: int = Field(default=3, ge=1)
    """Number of steps in the median."""


class KLOldConfig(MonitorConfig):
    """KL between the policies before and after one step's updates.

    PPO implementations stop the updates on a batch at 0.01 to 0.03 nats per token. Healthy runs of
    Trivium reached 0.023, in their first step.
    """

    limit: float = Field(default=0.1, gt=0)
    """Largest KL (k3) from π_old in one step, in nats per token."""


class EntropyConfig(MonitorConfig):
    """Entropy collapse.

    Cui et al. 2025 find that reward is gained at the cost of entropy, and that learning stops when
    entropy is used up. On a task with one correct answer a healthy run also ends low: a demo run
    fell to 0.19 of its first entropy.
    """

    share: float = Field(default=0.1, gt=0, lt=1)
    """Alarm if entropy is below this share of the first step's entropy."""
    floor: float = Field(default=0.01, gt=0)
    """Alarm also if entropy is below this many nats per token. The floor applies only if the first
    step had at least twice as much."""
    window: int = Field(default=5, ge=1)
    """Number of steps in the median."""


class LengthGrowthConfig(MonitorConfig):
    """Length explosion.

    Reward models (Singhal et al. 2023), DPO (Park et al. 2024) and sums of process rewards favor
    longer responses. If responses are meant to grow, raise the factor.
    """

    factor: float = Field(default=1.5, gt=1)
    """Alarm if the length is above the first step's length times this."""
    window: int = Field(default=5, ge=1)
    """Number of steps in the median."""


class LengthCollapseConfig(MonitorConfig):
    """Length collapse."""

    share: float = Field(default=0.5, gt=0, lt=1)
    """Alarm if the length is below this share of the first step's length."""
    window: int = Field(default=5, ge=1)
    """Number of steps in the median."""


class TruncatedConfig(MonitorConfig):
    """Responses that the length limit truncates. Disable it if texts have no end by design."""

    share: float = Field(default=0.5, gt=0, le=1)
    """Alarm if at least this share of responses is truncated."""
    window: int = Field(default=5, ge=1)
    """Number of steps in the mean."""
    first_share: float = Field(default=0.75, gt=0, le=1)
    """Alarm before the window is full if every step so far truncated at least this share."""


class EmptyConfig(MonitorConfig):
    """Responses without text, as given by a model that was not trained on its chat template."""

    share: float = Field(default=0.5, gt=0, le=1)
    """Alarm if at least this share of a step's responses is empty."""
    window: int = Field(default=1, ge=1)
    """Number of steps in the mean. One is enough: healthy policies rarely give empty responses."""


class EqualRewardsConfig(MonitorConfig):
    """Groups of equal rewards, which have no gradient (Yu et al. 2025, section 3.2)."""

    share: float = Field(default=0.9, gt=0, le=1)
    """Alarm if at least this share of groups has equal rewards."""
    window: int = Field(default=5, ge=1)
    """Number of steps in the median."""


class CriticConfig(MonitorConfig):
    """Critic that is worse than a constant: its explained variance is below 0.

    The explained variance of a new critic is noise around 0, so the default limit is slightly
    lower.
    """

    limit: float = Field(default=-0.05, lt=1)
    """Alarm if the explained variance is below this."""
    grace: int = Field(default=10, ge=0)
    """Number of first steps that are ignored."""
    window: int = Field(default=5, ge=1)
    """Number of steps in the median."""


class ClipFractionConfig(MonitorConfig):
    """Saturated clipping. A few percent of tokens are usual, fewer with long responses."""

    share: float = Field(default=0.3, gt=0, le=1)
    """Alarm if clipping removes the gradient of at least this share of tokens."""
    window: int = Field(default=5, ge=1)
    """Number of steps in the mean."""


class LostUpdatesConfig(MonitorConfig):
    """Updates that rounding swallows: the weights stay where they are, silently."""

    share: float = Field(default=0.5, gt=0, le=1)
    """Alarm if optimizer steps change less than this share of the weights that have a gradient."""
    window: int = Field(default=3, ge=1)
    """Number of steps in the median."""


class RatioConfig(MonitorConfig):
    """Extreme ratios. Single tokens reach 100 in a healthy first step, but medians do not."""

    limit: float = Field(default=100.0, gt=1)
    """Alarm if the largest ρ of a step is above this."""
    window: int = Field(default=5, ge=1)
    """Number of steps in the median."""


class SamplerConfig(MonitorConfig):
    """Difference between the sampler's and the trainer's log-probs.

    At ln 1.2 ≈ 0.2 the difference alone is as large as the usual clip range. Trivium's own engine
    differs by 1e-5 to 1e-4 in float32. In bfloat16 rounding moves the log-probs of rare tokens by
    some tenths of a nat, and servers differ by more (Yao et al. 2025).
    """

    limit: float = Field(default=0.2, gt=0)
    """Largest difference between the two log-probs of a token, in nats."""
    half_precision_limit: float = Field(default=1.0, gt=0)
    """The same if the weights are bfloat16."""
    window: int = Field(default=3, ge=1)
    """Number of steps in the median."""


class ChosenConfig(MonitorConfig):
    """DPO that lowers the probability of the chosen responses (Pal et al. 2024, Smaug)."""

    fall: float = Field(default=1.0, gt=0)
    """Alarm if the chosen responses' implicit reward fell by more than this (10 nats at β = 0.1)
    and by more than `share` of the margin's growth."""
    share: float = Field(default=1.0, gt=0)
    """Share of the margin's growth that the fall must exceed."""
    window: int = Field(default=5, ge=1)
    """Number of steps in the median."""


class PreferencesLearnedConfig(MonitorConfig):
    """Pairs that are fully learned: further steps only move the policy away from the reference."""

    accuracy: float = Field(default=0.99, gt=0.5, le=1)
    """Alarm if the preference accuracy is at least this and the gradient weight below `weight`."""
    weight: float = Field(default=0.05, gt=0, lt=0.5)
    """Limit of the mean gradient weight, which starts at 0.5."""
    window: int = Field(default=10, ge=1)
    """Number of steps in the median."""


class GradientConfig(MonitorConfig):
    """Exploding gradients, relative to the run's own gradient norms.

    Gradient clipping handles single spikes, so only very large ones count. Both limits multiply the
    median of the `window` steps before (at least 5).
    """

    factor: float = Field(default=10.0, gt=1)
    """Alarm if the median of the last `steps` norms is more than this times the earlier median."""
    jump: float = Field(default=100.0, gt=1)
    """Alarm if a single norm is more than this times the earlier median."""
    floor: float = Field(default=1.0, gt=0)
    """Norms up to this never raise the alarm."""
    steps: int = Field(default=3, ge=1)
    """Number of last norms in the median."""
    window: int = Field(default=20, ge=5)
    """Number of earlier norms that they are compared with."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.jump < self.factor:
            yield (
                "jump",
                f"below factor, which is {self.factor:g}: the limit for a single norm must not be "
                "lower than the limit for several; raise jump",
            )


class FallbacksConfig(MonitorConfig):
    """Reward functions that fail, so that their fallback value is used."""

    limit: int = Field(default=1, ge=1)
    """Alarm if one reward function fails on at least this many responses of a step."""


class OutOfMemoryConfig(MonitorConfig):
    """Micro-batches that run out of memory and are split in half, which costs time."""

    limit: int = Field(default=1, ge=1)
    """Alarm if at least this many micro-batches of a step were split."""


class RewardHackingConfig(MonitorConfig):
    """Training reward that rises while held-out quality falls.

    Quality is measured by the held-out reward (beyond its interval), the variety of words, and the
    likelihood under the reference. Healthy runs of Trivium lost up to 0.04 of variety (60
    responses) and 0.1 nats.
    """

    rise: float = Field(default=0.1, gt=0)
    """Smallest rise that counts, in standard deviations of the reward at the start of the run."""
    window: int = Field(default=3, ge=1)
    """Number of steps over which training rewards are averaged."""
    variety: float = Field(default=0.05, gt=0, le=2)
    """Alarm if distinct words − repeated 3-grams (shares) fell by more than this and by more than
    noise. If responses grew, only repeated 3-grams count, because long texts repeat words."""
    reference_logprob: float = Field(default=0.3, gt=0)
    """Alarm if the samples' log-prob under the reference fell by more nats per token than this."""


class LearnedRewardConfig(MonitorConfig):
    """Learned reward that does not rank the policy's own responses better than chance.

    ``reward_update`` measures its accuracy on freshly labeled responses before it learns from them.
    """

    window: int = Field(default=3, ge=1)
    """Number of last updates that are pooled. Alarm if the 95 % interval of their accuracy contains
    one half."""
    share: float = Field(default=0.5, gt=0, le=1)
    """Alarm also if the accuracy lost this share of what it was above one half in the first update,
    and its interval lies below that of the first update."""


class HeldOutQualityConfig(MonitorConfig):
    """Held-out quality that fell significantly from its best evaluation, whatever the reward did.

    The test is paired over the same prompts.
    """

    share: float = Field(default=0.1, ge=0, le=1)
    """Smallest fall that counts, as a share of the gain since the first evaluation."""
    confidence: float = Field(default=0.99, ge=0.5, lt=1)
    """Probability that none of the run's comparisons finds a fall where there is none."""


class RewardFallConfig(MonitorConfig):
    """Training reward that falls step after step: the policy learns something else."""

    window: int = Field(default=16, ge=4)
    """Number of steps through which a line is fitted."""
    fall: float = Field(default=0.25, gt=0)
    """Smallest fall over the window that counts, in standard deviations of the reward at the start
    of the run."""
    confidence: float = Field(default=0.9999, gt=0.5, lt=1)
    """Probability that the line of a steady reward falls less, relative to its error."""


class MonitorsConfig(Configuration):
    """Rules over a run's metrics that raise alarms. Every monitor warns by default."""

    non_finite: NonFiniteConfig = NonFiniteConfig()
    kl: KLConfig = KLConfig()
    kl_old: KLOldConfig = KLOldConfig()
    entropy: EntropyConfig = EntropyConfig()
    length_growth: LengthGrowthConfig = LengthGrowthConfig()
    length_collapse: LengthCollapseConfig = LengthCollapseConfig()
    truncated: TruncatedConfig = TruncatedConfig()
    empty: EmptyConfig = EmptyConfig()
    equal_rewards: EqualRewardsConfig = EqualRewardsConfig()
    critic: CriticConfig = CriticConfig()
    clip_fraction: ClipFractionConfig = ClipFractionConfig()
    ratio: RatioConfig = RatioConfig()
    sampler_difference: SamplerConfig = SamplerConfig()
    chosen_logprob: ChosenConfig = ChosenConfig()
    preferences_learned: PreferencesLearnedConfig = PreferencesLearnedConfig()
    gradient_norm: GradientConfig = GradientConfig()
    lost_updates: LostUpdatesConfig = LostUpdatesConfig()
    fallbacks: FallbacksConfig = FallbacksConfig()
    out_of_memory: OutOfMemoryConfig = OutOfMemoryConfig()
    reward_hacking: RewardHackingConfig = RewardHackingConfig()
    learned_reward: LearnedRewardConfig = LearnedRewardConfig()
    held_out_quality: HeldOutQualityConfig = HeldOutQualityConfig()
    reward_fall: RewardFallConfig = RewardFallConfig()

    again_after: int = Field(default=10, ge=1)
    """Number of steps without its condition after which an alarm can be raised again."""
