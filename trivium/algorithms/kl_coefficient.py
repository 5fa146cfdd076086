"""β of the KL term in PPO's reward: fixed, or adapted to a target KL (Ziegler et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping

from trivium.algorithms.ppo_config import AdaptiveKLConfig
from trivium.maths.kl import adapted_coefficient


class KLCoefficient:
    """The current β.

    Attributes:
        value: β of the next rollout batch.
    """

    def __init__(self, value: float, adaptive: AdaptiveKLConfig | None) -> None:
        self.value = value
        self._adaptive = adaptive

    def adapt(self, metrics: Mapping[str, float], responses: int) -> None:
        """Adapt β to the KL that a step with this number of responses measured, if configured."""
        if self._adaptive is not None:
            self.value = adapted_coefficient(
                self.value,
                metrics["kl/response"],
                self._adaptive.target,
                responses,
                self._adaptive.horizon,
            )

    def state_dict(self) -> float:
        """Return β."""
        return self.value

    def load_state_dict(self, state: float) -> None:
        """Continue with a saved β."""
        self.value = state
