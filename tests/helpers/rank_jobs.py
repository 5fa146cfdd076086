"""Jobs of the processes of a distributed test, which are forked from one that imports this."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft  # noqa: F401
import pytest
import torch
from torch import Tensor

from helpers.stoppable_runs import RUNS, grpo_config, run_results
from helpers.tiny_models import STILL, Captured, World
from trivium import distributed
from trivium.algorithms import dpo, grpo, ppo, reward_model, sft
from trivium.algorithms.dpo_config import DPOConfig
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.algorithms.reward_model_config import RewardModelConfig
from trivium.algorithms.sft_config import SFTConfig
from trivium.config.base import Configuration
from trivium.data.batch import Grouped
from trivium.data.group import Group
from trivium.errors import RewardError, TrainingError, TriviumError
from trivium.rollout.local_engine import LocalEngine
from trivium.runs import checkpointing
from trivium.runs.signals import Interrupted, SamplingAborted
from trivium.training.micro_batch import MicroBatch, accumulate_on_all_ranks
from trivium.training.optimizer import Optimizer
from trivium.training.optimizer_config import OptimizerConfig

FAMILIES = ("llama", "qwen2", "qwen3", "lora")
DATA = [
    {"prompt": p, "chosen": c, "rejected": r}
    for p, c, r in (
        ("abc", "de", "efgh"), ("b", "fghij.a", "f"), ("aaaa", "c", "cd"),
        ("ij", "abcdefgh", "a.a.a."), ("c", "ca", "b"),
    )
]  # fmt: skip
BUDGET = 24
"""Tokens per micro-batch: few enough for several micro-batches in a step."""
WHOLE_GROUPS = 40
"""The same, enough for every group: norms of transformers round to float32, also of float64, so
only equal groups have equal hidden states to the last bit."""


def worlds(directory: Path) -> dict[str, World]:
    """Write a model of every family, and the data that all ranks read."""
    found = {}
    for family in FAMILIES:
        options = {"tie_word_embeddings": True} if family == "qwen2" else {}
        (directory / family).mkdir()
        world = World(directory / family, "llama" if family == "lora" else family, **options)
        world.rows("pairs.jsonl", DATA)
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in DATA]
        world.rows("rows.jsonl", rows)
        found[family] = world
    return found


# --- training runs --------------------------------------------------------------------------------


def grpo_run(world: World, model: dict[str, Any], run: Path) -> None:
    grpo.train(GRPOConfig(
        **world.on_policy("letters", model=model, run={"directory": str(run)}),
        steps_per_iteration=1, epochs=2, beta=0.1, tokens_per_micro_batch=WHOLE_GROUPS,
    ))  # fmt: skip


def ppo_run(world: World, model: dict[str, Any], run: Path, kind: str = "separate") -> None:
    ppo.train(PPOConfig(
        **world.on_policy("letters", model=model, run={"directory": str(run)}),
        steps=1, epochs=2, tokens_per_micro_batch=WHOLE_GROUPS,
        critic={"kind": kind, "optimizer": STILL}, bootstrap_truncated=True,
    ))  # fmt: skip


def ppo_shared_run(world: World, model: dict[str, Any], run: Path) -> None:
    ppo_run(world, model, run, "shared")


def dpo_run(world: World, model: dict[str, Any], run: Path) -> None:
    dpo.train(DPOConfig(
        model=model, data={"path": str(world.directory / "pairs.jsonl")},
        run={"directory": str(run)}, optimizer=STILL, pairs_per_step=5,
        tokens_per_micro_batch=BUDGET,
    ))  # fmt: skip


def sft_config(world: World, model: dict[str, Any], run: Path) -> SFTConfig:
    data = {"path": str(world.directory / "rows.jsonl")}
    return SFTConfig(
        model=model, data=data, validation=data, run={"directory": str(run)}, optimizer=STILL,
        steps=1, examples_per_step=5, tokens_per_micro_batch=BUDGET,
    )  # fmt: skip


def sft_run(world: World, model: dict[str, Any], run: Path) -> None:
    sft.train(sft_config(world, model, run))


def reward_model_run(world: World, model: dict[str, Any], run: Path) -> None:
    reward_model.train(RewardModelConfig(
        model=model, pairs={"path": str(world.directory / "pairs.jsonl")},
        run={"directory": str(run)}, optimizer=STILL, examples_per_step=5,
        held_out_share=0.0, tokens_per_micro_batch=BUDGET,
    ))  # fmt: skip


TRAINED: dict[str, Callable[[World, dict[str, Any], Path], None]] = {
    "grpo": grpo_run,
    "ppo": ppo_run,
    "ppo-shared": ppo_shared_run,
    "dpo": dpo_run,
    "sft": sft_run,
    "reward-model": reward_model_run,
}
Cases = Sequence[tuple[str, str]]
Gradients = dict[tuple[str, str], list[list[Tensor]]]


def gradients(worlds: dict[str, World], directory: Path, names: Cases) -> tuple[Gradients, str]:
    """Return the gradients of every optimizer step of these families and algorithms.

    Of several ranks the first returns them; all return their digest.
    """
    found: Gradients = {}
    digest = hashlib.sha256()
    with pytest.MonkeyPatch.context() as patch:
        captured = Captured(patch)
        for saving in ("save_model", "try_to_save"):  # which takes longer than all the rest
            patch.setattr(checkpointing.CheckpointManager, saving, lambda *_: True)
        for family, name in names:
            # Attention over shared prompts merges exponentials that are exact to 1e-8 only.
            model: dict[str, Any] = {"path": worlds[family].path, "dtype": "float64"}
            if family == "lora":
                model["lora"] = {"rank": 2}
            TRAINED[name](worlds[family], model, directory / f"{family}-{name}")
            found[family, name] = captured.take()
            for gradient in (g for step in found[family, name] for g in step):
                digest.update(gradient.numpy().tobytes())
    return (found if distributed.rank() == 0 else {}), digest.hexdigest()


# --- micro-batches --------------------------------------------------------------------------------


def line(tokens: list[int]) -> Group:
    return Group([1], [tokens])


def accumulated(counts: Sequence[int]) -> list[tuple[list[float], list[list[int]], int]]:
    """Return gradient, observed tokens and own share of optimizer steps of these sizes.

    Micro-batch i adds i + 1 to the gradient of one parameter, and nothing to that of another.
    """
    distributed.join()
    found = []
    for count in counts:
        trained = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        unused = torch.nn.Parameter(torch.zeros(1))
        own: list[int] = []

        def loss(data: Grouped) -> tuple[Tensor, dict[str, Tensor]]:
            tokens = torch.tensor(data.groups[0].responses[0])
            own.append(int(tokens[0]))  # noqa: B023
            return (trained * tokens[0]).sum(), {"tokens_T": tokens}  # noqa: B023

        micro_batches = [MicroBatch(Grouped([line([i + 1] * (i + 1))]), loss) for i in range(count)]
        results, splits = accumulate_on_all_ranks(micro_batches, lambda: None, [trained, unused])
        assert splits == 0 and unused.grad is None and trained.grad is not None
        observed = [result.observed["tokens_T"].tolist() for result in results]
        found.append((trained.grad.tolist(), observed, len(own)))
    return found


def half_precision_weights(kind: str) -> tuple[float, list[float]]:
    """Return the gradient norm and the bfloat16 weights of five optimizer steps of three losses."""
    distributed.join()
    trained = torch.nn.Parameter(torch.linspace(-2, 2, 64).bfloat16())
    slopes = torch.linspace(1, 3, 64).bfloat16()
    config = OptimizerConfig(learning_rate=1e-3, max_grad_norm=100.0, half_precision=kind)
    optimizer = Optimizer([(config, [trained])], 5)

    def loss(data: Grouped) -> tuple[Tensor, dict[str, Tensor]]:
        return (slopes * trained).sum() * data.groups[0].responses[0][0], {}

    result = None
    for _ in range(5):
        micro_batches = [MicroBatch(Grouped([line([i + 1])]), loss) for i in range(3)]
        result = optimizer.step(micro_batches)
    assert result is not None
    return result.gradient_norm, trained.tolist()


# --- failures -------------------------------------------------------------------------------------


def raised(act: Callable[[], object]) -> str:
    """Return the class and the message of what a call raises."""
    try:
        act()
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failures() -> dict[str, str]:
    """Return how this rank ends where ranks differ or one of them fails, and what works after."""
    distributed.join()
    rank = distributed.rank()

    def fail_on_1(error: BaseException) -> Callable[[], int]:
        def make() -> int:
            if rank == 1:
                raise error
            return rank

        return make

    def fail_on_all() -> int:
        raise TriviumError("a failure") if rank == 0 else SamplingAborted

    return {
        "plans": raised(lambda: distributed.agree("a plan", [rank > 0])),
        "points": raised(lambda: distributed.agree(f"point {min(rank, 1)}", 0)),
        "error": raised(lambda: distributed.gather("x", fail_on_1(ValueError("wrong")))),
        "own error": raised(lambda: distributed.gather("x", fail_on_1(RewardError("bad")))),
        "signal": raised(lambda: distributed.gather("x", fail_on_1(SamplingAborted()))),
        "signal and error": raised(lambda: distributed.gather("x", fail_on_all)),
        "after": str(distributed.gather("x", lambda: rank)),
    }


def values() -> list[Any]:
    """Return a value with tensors of every kind, gathered, and rank 0's."""
    distributed.join()
    rank = distributed.rank()
    mine = {"x": torch.arange(rank).double(), "n": [torch.tensor(2.5), torch.empty(0, 3)]}
    own = distributed.own(list("abcde"))
    shares = distributed.gather("shares", lambda: own)
    return [
        distributed.gather("values", lambda: mine),
        distributed.from_rank_0("first", lambda: torch.tensor([rank])),
        distributed.in_order(shares, 5),
    ]


def killed(world: World, run: Path, victim: int) -> tuple[str, str | None]:
    """Train until one rank kills itself; return what is raised, and what this rank prints."""
    move = torch.optim.AdamW.step

    def step(optimizer: Any, *rest: Any) -> Any:
        if distributed.rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return move(optimizer, *rest)

    torch.optim.AdamW.step = step  # type: ignore[method-assign]
    try:
        sft_run(world, {"path": world.path}, run)
    except TrainingError as error:
        return str(error), distributed.final_message(str(error))
    return "nothing was raised", None


# --- stopped runs ---------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run as if its process were killed."""


def float64_config(world: World, run: Path) -> GRPOConfig:
    """Return a run of GRPO in float64, in which rounding is too small to change a sample."""
    options = grpo_config(world, run).model_dump()
    options["model"]["dtype"] = "float64"
    return GRPOConfig.model_validate(options)


STOPPABLE = {**RUNS, "grpo-float64": (grpo.train, float64_config)}


def train(name: str, world: World, run: Path, stop_after: int | None = None) -> str:
    """Train a run of ``helpers.stoppable_runs`` until it ends, or until ``stop_after`` saves."""
    function, make_config = STOPPABLE[name]
    config: Configuration = make_config(world, run)
    save, saves = checkpointing.CheckpointManager.save, []

    def save_and_stop(manager: checkpointing.CheckpointManager, *arguments: Any) -> None:
        save(manager, *arguments)
        saves.append(arguments[0])
        if len(saves) == stop_after:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "MIN_INTERVAL_PER_SAVE", 0)
        patch.setattr(checkpointing.CheckpointManager, "save", save_and_stop)
        try:
            function(config)
        except (Killed, TrainingError, Interrupted) as stopped:
            return f"{type(stopped).__name__}: {stopped}"
    return "finished"


def trained(names: Sequence[str], world: World, directory: Path, stop_after: int) -> list[Any]:
    """Train runs without interruption, and stopped and resumed; return both results of each."""
    found = []
    for name in names:
        assert train(name, world, directory / f"{name}-whole") == "finished"
        assert train(name, world, directory / f"{name}-stopped", stop_after) != "finished"
        assert train(name, world, directory / f"{name}-stopped") == "finished"
        if distributed.rank() == 0:
            found.append([run_results(directory / f"{name}-{k}") for k in ("whole", "stopped")])
    return found


def interrupted(world: World, run: Path) -> tuple[str, str]:
    """Train; a signal reaches the last rank while it samples. Return how that ends, and resume."""
    generate, calls = LocalEngine.generate, []

    def generate_or_stop(engine: LocalEngine, *arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 and distributed.rank() == distributed.size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(engine, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalEngine, "generate", generate_or_stop)
        stopped = train("grpo-lora", world, run)
    return stopped, train("grpo-lora", world, run)
