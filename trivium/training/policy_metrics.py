"""Metrics of a policy update, computed from per-token observations."""

from __future__ import annotations

import torch
from torch import Tensor

from trivium.evaluation.samples import Rows, training_rows
from trivium.maths.advantages import equal_groups
from trivium.maths.kl import k1, k3
from trivium.maths.objectives import SurrogateLoss, importance_ratio
from trivium.maths.ragged import segment_ids
from trivium.models.policy import Policy
from trivium.rollout.rollouts import Rollouts
from trivium.training.experience import Experience, Minibatch
from trivium.training.optimizer import StepResult
from trivium.training.protocols import Updates


def first_group(policy: Policy, rollouts: Rollouts, experience: Experience) -> Rows:
    """Return the step's first group for ``samples.jsonl``: advantages and log-ratios by token."""
    ref_T = experience.ref_logprobs_T
    log_ratio_T = None if ref_T is None else rollouts.sampler_logprobs_T - ref_T.cpu()
    return training_rows(rollouts, policy.tokenizer, experience.advantages_T, log_ratio_T)


def join_observed(results: list[StepResult]) -> dict[str, Tensor]:
    """Concatenate the observations of several optimizer steps."""
    names = results[0].observed
    return {name: torch.cat([r.observed[name] for r in results]) for name in names}


def update_metrics(results: list[StepResult]) -> dict[str, float]:
    """Return means over the optimizer steps of a batch, and the number of memory splits, if any."""
    count, splits = len(results), sum(r.splits for r in results)
    names = dict.fromkeys(name for r in results for name in r.weights)
    moved = {name: [r.weights[name] for r in results if name in r.weights] for name in names}
    return {
        **({"memory/splits": float(splits)} if splits else {}),
        **{name: sum(values) / len(values) for name, values in moved.items()},
        "loss": sum(r.loss for r in results) / count,
        "gradient_norm": sum(r.gradient_norm for r in results) / count,
        "learning_rate": results[-1].learning_rate,
        "optimizer_steps": float(count),
    }


def clip_masks(surrogate: SurrogateLoss | Tensor) -> dict[str, Tensor]:
    """Return the observations of a surrogate's clipping; none if it returned the loss alone."""
    if isinstance(surrogate, Tensor):
        return {}
    return {
        "clipped_low_T": surrogate.clipped_low_T.detach(),
        "clipped_high_T": surrogate.clipped_high_T.detach(),
    }


def policy_metrics(observed: dict[str, Tensor]) -> dict[str, float]:
    """Return entropy, ratio, clipping and distance from π_old, averaged over response tokens.

    ``observed`` holds ``logprobs_T``, ``old_logprobs_T``, ``entropy_T`` and ``advantages_T``, and
    the surrogate's ``clip_masks`` if it has any.
    """
    logprobs_T, old_T = observed["logprobs_T"], observed["old_logprobs_T"]
    advantages_T = observed["advantages_T"]
    ratio_T = importance_ratio(logprobs_T, old_T)
    return {
        "policy/entropy": float(observed["entropy_T"].mean()),
        "policy/ratio_mean": float(ratio_T.mean()),
        "policy/ratio_min": float(ratio_T.min()),
        "policy/ratio_max": float(ratio_T.max()),
        **{
            f"policy/clip_{end}": float(observed[f"clipped_{end}_T"].float().mean())
            for end in ("low", "high")
            if f"clipped_{end}_T" in observed
        },
        "policy/kl_old": float(k3(old_T, logprobs_T).mean()),
        "policy/kl_old_k1": float(k1(old_T, logprobs_T).mean()),
        "tokens/trained": float(len(logprobs_T)),
        "advantage/mean": float(advantages_T.mean()),
        "advantage/std": float(advantages_T.std(correction=0)),
    }


def group_metrics(
    rollouts: Rollouts, updates: Updates[Minibatch], equal_G: Tensor
) -> dict[str, float]:
    """Return the shares of groups with equal rewards, and without a response in a micro-batch."""
    group_of = segment_ids(rollouts.sizes_G).tolist()
    used = {
        group_of[response]
        for minibatch in updates.planned
        for micro_batch in minibatch.micro_batches
        for response in micro_batch
    }
    return {
        "group/equal_rewards": float(equal_G.float().mean()),
        "group/skipped": 1 - len(used) / len(rollouts.prompts),
    }


def old_policy_metrics(
    experience: Experience, rollouts: Rollouts, updates: Updates[Minibatch]
) -> dict[str, float]:
    """Compare π_old with the sampler and, if there is one, the reference, after the updates."""
    old_T = experience.with_first_step_logprobs(updates).old_logprobs_T
    rescored_T, ref_T = experience.rescored_mask_T, experience.ref_logprobs_T
    assert old_T is not None and rescored_T is not None, (
        "π_old is scored by the first optimizer step at the latest"
    )
    return {
        **({} if ref_T is None else reference_metrics(old_T, ref_T, len(rollouts.flat))),
        "policy/old_scored": float(rescored_T.float().mean()),
        "policy/sampler_difference": float((old_T.cpu() - rollouts.sampler_logprobs_T).abs().max()),
    }


def reference_metrics(
    logprobs_T: Tensor, ref_logprobs_T: Tensor, responses: int
) -> dict[str, float]:
    """Return the KL to the reference on the policy's own samples: per token, and per response."""
    return {
        "kl/k1": float(k1(logprobs_T, ref_logprobs_T).mean()),
        "kl/k3": float(k3(logprobs_T, ref_logprobs_T).mean()),
        "kl/response": float(k1(logprobs_T, ref_logprobs_T).sum()) / responses,
    }


def value_metrics(values_T: Tensor, targets_T: Tensor) -> dict[str, float]:
    """Return how well the critic predicted the return targets before the update.

    Explained variance is ``1 − Var(Target − V_old)/Var(Target)``: 1 is perfect, 0 no better than a
    constant. It is 0 if the targets are equal within rounding.
    """
    one_group = torch.tensor([len(targets_T)], device=targets_T.device)
    constant = bool(equal_groups(targets_T, one_group))
    variance = float(targets_T.var(correction=0))
    unexplained = float((targets_T - values_T).var(correction=0))
    return {
        "value/mean": float(values_T.mean()),
        "value/target_mean": float(targets_T.mean()),
        "value/explained_variance": 0.0 if constant else 1 - unexplained / variance,
    }
