"""The equations: pure functions of tensors and scalars, for use here or in loops of your own.

Names are imported when they are first used: ``options`` must be readable without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trivium.maths.advantages import (
        decoupled_advantages,
        equal_groups,
        gae,
        group_advantages,
        leave_one_out_advantages,
        normalize_over_batch,
        return_targets,
        step_advantages,
        whiten,
    )
    from trivium.maths.aggregation import (
        fixed_length,
        sequence_mean,
        token_mean,
        token_weights,
        weighted_sum,
    )
    from trivium.maths.kl import adapted_coefficient, k1, k2, k3, kl_shaped_rewards
    from trivium.maths.objectives import (
        SurrogateLoss,
        bradley_terry_loss,
        cispo_surrogate,
        clipped_surrogate,
        dpo_loss,
        gspo_surrogate,
        hinge_loss,
        importance_ratio,
        ipo_loss,
        masked_importance,
        masked_sequence_importance,
        preference_gradient_weight,
        robust_loss,
        step_loss,
        token_nll,
        truncated_importance,
        truncated_sequence_importance,
        value_loss,
    )
    from trivium.maths.options import (
        ADVANTAGES,
        AGGREGATIONS,
        IMPORTANCE_WEIGHTS,
        KL_ESTIMATORS,
        PREFERENCE_LOSSES,
        SURROGATES,
    )
    from trivium.maths.ragged import (
        repeat_per_segment,
        segment_ids,
        segment_mean,
        segment_starts,
        segment_sum,
        suffix_sum,
    )

_MODULES = {
    "advantages": (
        "decoupled_advantages equal_groups gae group_advantages leave_one_out_advantages "
        "normalize_over_batch return_targets step_advantages whiten"
    ),
    "aggregation": "fixed_length sequence_mean token_mean token_weights weighted_sum",
    "kl": "adapted_coefficient k1 k2 k3 kl_shaped_rewards",
    "objectives": (
        "SurrogateLoss bradley_terry_loss clipped_surrogate "
        "cispo_surrogate dpo_loss hinge_loss importance_ratio ipo_loss "
        "masked_importance masked_sequence_importance preference_gradient_weight robust_loss "
        "gspo_surrogate step_loss token_nll truncated_importance truncated_sequence_importance "
        "value_loss"
    ),
    "options": (
        "ADVANTAGES AGGREGATIONS IMPORTANCE_WEIGHTS KL_ESTIMATORS PREFERENCE_LOSSES SURROGATES"
    ),
    "ragged": "segment_ids segment_mean segment_starts segment_sum repeat_per_segment suffix_sum",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'trivium.maths' has no attribute {name!r}")
    value = getattr(import_module(f"trivium.maths.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "IMPORTANCE_WEIGHTS",
    "KL_ESTIMATORS",
    "PREFERENCE_LOSSES",
    "SURROGATES",
    "SurrogateLoss",
    "adapted_coefficient",
    "bradley_terry_loss",
    "cispo_surrogate",
    "clipped_surrogate",
    "decoupled_advantages",
    "dpo_loss",
    "equal_groups",
    "fixed_length",
    "gae",
    "group_advantages",
    "gspo_surrogate",
    "hinge_loss",
    "importance_ratio",
    "ipo_loss",
    "k1",
    "k2",
    "k3",
    "kl_shaped_rewards",
    "leave_one_out_advantages",
    "masked_importance",
    "masked_sequence_importance",
    "normalize_over_batch",
    "preference_gradient_weight",
    "repeat_per_segment",
    "return_targets",
    "robust_loss",
    "segment_ids",
    "segment_mean",
    "segment_starts",
    "segment_sum",
    "sequence_mean",
    "step_advantages",
    "step_loss",
    "suffix_sum",
    "token_mean",
    "token_nll",
    "token_weights",
    "truncated_importance",
    "truncated_sequence_importance",
    "value_loss",
    "weighted_sum",
    "whiten",
]
