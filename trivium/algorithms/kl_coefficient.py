"""β of the KL term in PPO's reward: fixed, or steered towards a KL (Ziegler et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping

from trivium.algorithms.ppo_config import AdaptiveKLConfig
from trivium.maths.kl import adapted_coefficient


class KLCoefficient:
    """β as it stands.

    Attributes:
        value: β of the next rollout batch.
    """

    def __init__(self, value: float, adaptive: AdaptiveKLConfig | None) -> None:
        self.value = value
        self._adaptive = adaptive

    def adapt(self, metrics: Mapping[str, float], responses: int) -> None:
        """Move β by what a step of so many responses measured as KL, where it is to be steered."""
        if self._adaptive is not None:
            kl, target, horizon = (
                metrics["kl/response"],
                self._adaptive.target,
                self._adaptive.horizon,
            )
            self.value = adapted_coefficient(self.value, kl, target, responses, horizon)

    def state_dict(self) -> float:
        """β."""
        return self.value

    def load_state_dict(self, state: float) -> None:
        """Go on from a β."""
        self.value = state
