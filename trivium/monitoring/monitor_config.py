"""What each monitor allows: limits, windows, and what an alarm does.

A default is set so that healthy runs stay silent (docs/monitors.md has the measurements). Windows
are counted in training steps that log the metric. How a limit is watched is in ``monitor_rules``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from trivium.config.base import Configuration, Conflict


class MonitorConfig(Configuration):
    """What every monitor can be told."""

    action: Literal["warn", "stop", "off"] = "warn"
    """What an alarm does: tell, or tell and stop the run; off: the monitor does not watch."""


class NonFiniteConfig(MonitorConfig):
    """Metrics that are NaN or infinite: any is one too many."""


class KLConfig(MonitorConfig):
    """Distance from the reference: alarms where both limits are passed.

    A limit per response alone would forbid long answers, whose log-ratios add up over thousands of
    tokens; one per token alone would call ten tokens' worth of a new habit a failure. Adaptive
    controllers after Ziegler et al. 2019 aim at single-digit nats per response; Gao et al. 2022
    show quality turning down as the distance grows on.
    """

    limit: float = Field(default=10.0, gt=0)
    """Nats per response."""
    per_token: float = Field(default=0.1, gt=0)
    """Nats per token, for long answers: 100 nats over 1000 tokens."""
    window: int = Field(default=3, ge=1)
    """Steps whose median counts."""


class KLOldConfig(MonitorConfig):
    """Distance that one step's updates moved the policy.

    PPO implementations stop a batch's updates at 0.01 to 0.03 nats per token; healthy runs here had
    up to 0.023, in their first step.
    """

    limit: float = Field(default=0.1, gt=0)
    """Nats per token (k3) from π_old in one step."""


class EntropyConfig(MonitorConfig):
    """Entropy collapse.

    Cui et al. 2025 find reward to be bought with entropy, and none left to buy once it is gone. A
    task with one right answer ends low: a verified demo run went to 0.19 of its start in health.
    """

    share: float = Field(default=0.1, gt=0, lt=1)
    """Alarm below this share of the entropy that the run began with."""
    floor: float = Field(default=0.01, gt=0)
    """Alarm below so many nats per token too, where the run began with twice as many."""
    window: int = Field(default=5, ge=1)
    """Steps whose median counts."""


class LengthGrowthConfig(MonitorConfig):
    """Length explosion.

    Longer is what reward models (Singhal et al. 2023), DPO (Park et al. 2024) and sums over steps
    pay for unasked. Reasoning that is meant to grow passes any limit: raise it there.
    """

    factor: float = Field(default=1.5, gt=1)
    """Alarm above so many times the length that the run began with."""
    window: int = Field(default=5, ge=1)
    """Steps whose median counts."""


class LengthCollapseConfig(MonitorConfig):
    """Length collapse."""

    share: float = Field(default=0.5, gt=0, lt=1)
    """Alarm below this share of the length that the run began with."""
    window: int = Field(default=5, ge=1)
    """Steps whose median counts."""


class TruncatedConfig(MonitorConfig):
    """Responses that the length limit ends. Switch it off where texts have no end by design."""

    share: float = Field(default=0.5, gt=0, le=1)
    """Alarm where at least this share of responses is cut off."""
    window: int = Field(default=5, ge=1)
    """Steps whose mean counts."""


class EmptyConfig(MonitorConfig):
    """Responses without text. A model that does not know its chat template ends at once."""

    share: float = Field(default=0.5, gt=0, le=1)
    """Alarm where at least this share of a step's responses is empty."""
    window: int = Field(default=1, ge=1)
    """Steps whose mean counts; one is enough, since a healthy policy rarely says nothing."""


class EqualRewardsConfig(MonitorConfig):
    """Groups that teach nothing (Yu et al. 2025, section 3.2)."""

    share: float = Field(default=0.9, gt=0, le=1)
    """Alarm where at least this share of groups has equal rewards."""
    window: int = Field(default=5, ge=1)
    """Steps whose median counts."""


class CriticConfig(MonitorConfig):
    """A critic that is worse than a constant: explained variance below 0.

    A fresh critic stands around 0, by noise on either side, so the default asks for a little more.
    """

    limit: float = Field(default=-0.05, lt=1)
    """Alarm where the explained variance is below this."""
    grace: int = Field(default=10, ge=0)
    """First steps that do not count."""
    window: int = Field(default=5, ge=1)
    """Steps whose median counts."""


class ClipFractionConfig(MonitorConfig):
    """Clipping saturated: a few per cent of tokens are usual, less where responses are long."""

    share: float = Field(default=0.3, gt=0, le=1)
    """Alarm where clipping takes the gradient of at least this share of tokens."""
    window: int = Field(default=5, ge=1)
    """Steps whose mean counts."""


class RatioConfig(MonitorConfig):
    """Extreme ratios. Single tokens reach 100 in a healthy first step; a median does not."""

    limit: float = Field(default=100.0, gt=1)
    """Alarm where the largest ρ of a step is above this."""
    window: int = Field(default=5, ge=1)
    """Steps whose median counts."""


class SamplerConfig(MonitorConfig):
    """Sampler and trainer disagree on what the policy is.

    At ln 1.2 ≈ 0.2 the disagreement alone is as large as the usual clip range. Our own engine
    differs by 1e-5 to 1e-4; bfloat16 servers by much more (Yao et al. 2025).
    """

    limit: float = Field(default=0.2, gt=0)
    """Nats between both log-probs of a token, at most."""
    window: int = Field(default=3, ge=1)
    """Steps whose median counts."""


class ChosenConfig(MonitorConfig):
    """DPO that makes the chosen responses unlikely (Pal et al. 2024, Smaug)."""

    fall: float = Field(default=1.0, gt=0)
    """Alarm where the chosen responses' implicit reward fell by more than this (10 nats at β 0.1).
    """
    share: float = Field(default=1.0, gt=0)
    """And by more than this share of what the margin grew."""
    window: int = Field(default=5, ge=1)
    """Steps whose median counts."""


class PreferencesLearnedConfig(MonitorConfig):
    """Pairs that are all told apart, with certainty: further steps only move the policy away."""

    accuracy: float = Field(default=0.99, gt=0.5, le=1)
    """Alarm where the preference accuracy is at least this."""
    weight: float = Field(default=0.05, gt=0, lt=0.5)
    """And the mean gradient weight below this; it starts at 0.5."""
    window: int = Field(default=10, ge=1)
    """Steps whose median counts."""


class GradientConfig(MonitorConfig):
    """Exploding gradients, against the run's own. Single spikes are clipped and pass unless huge.

    Both limits are times the median of the `window` steps before (of 5 at least).
    """

    factor: float = Field(default=10.0, gt=1)
    """Alarm where the median of the last `steps` norms is so many times as large."""
    jump: float = Field(default=100.0, gt=1)
    """Alarm where one norm is so many times as large."""
    floor: float = Field(default=1.0, gt=0)
    """Norms up to this are never too large."""
    steps: int = Field(default=3, ge=1)
    """Last norms whose median counts."""
    window: int = Field(default=20, ge=5)
    """Norms before them that they are compared with."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.jump < self.factor:
            yield (
                "jump",
                f"below factor, which is {self.factor:g}: a single norm must pass a higher limit "
                "than several; raise jump",
            )


class FallbacksConfig(MonitorConfig):
    """Rewards that fail and get their fallback value."""

    limit: int = Field(default=1, ge=1)
    """Alarm where one reward fails on so many responses of a step."""


class OutOfMemoryConfig(MonitorConfig):
    """Micro-batches that do not fit the memory and are done in halves, at the cost of time."""

    limit: int = Field(default=1, ge=1)
    """Alarm where so many micro-batches of a step were halved."""


class RewardHackingConfig(MonitorConfig):
    """Training reward rises while held-out quality, which it does not see, falls.

    Quality is the held-out reward beyond its interval, the variety of words, and the likelihood
    under the reference. Healthy runs here lost up to 0.04 of variety (60 responses) and 0.1 nats.
    """

    rise: float = Field(default=0.1, gt=0)
    """What counts as risen: so many of the reward's standard deviations at the start."""
    window: int = Field(default=3, ge=1)
    """Steps over which training rewards are averaged."""
    variety: float = Field(default=0.05, gt=0, le=2)
    """Alarm where distinct words − repeated 3-grams (shares) fell by more than this, and by more
    than noise; where answers grew, repeated 3-grams alone count, since long texts repeat words."""
    reference_logprob: float = Field(default=0.3, gt=0)
    """Alarm where samples lost more than so many nats per token under the reference."""


class MonitorsConfig(Configuration):
    """Rules over a run's metrics that raise alarms; every monitor warns by default."""

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
    fallbacks: FallbacksConfig = FallbacksConfig()
    out_of_memory: OutOfMemoryConfig = OutOfMemoryConfig()
    reward_hacking: RewardHackingConfig = RewardHackingConfig()

    again_after: int = Field(default=10, ge=1)
    """An alarm is raised again only after so many steps without its condition."""
