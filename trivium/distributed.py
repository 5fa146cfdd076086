"""Several processes ("ranks") that compute one run, and the few things that they exchange.

Every rank holds the same small data: rollouts, advantages, plans, metrics. Ranks divide work by
``own``, and ``gather`` gives each of them all results. Exchanges are numbered by nothing but their
order, so each one carries what it is about and a digest of the plan it belongs to: ranks that
disagree raise instead of waiting for each other. A failure on one rank is raised on all.

A rank that is lost ends the run with one message that names it (``rank_status``). With one process,
everything here does nothing. This module knows no algorithm, and imports torch only when there are
several ranks.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from trivium.errors import ConfigurationError, TrainingError, TriviumError
from trivium.rank_status import RankStatus

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")

TIMEOUT = timedelta(hours=1)
"""How long a rank waits for another one that is alive."""
BUCKET = 1 << 24
"""Numbers of a gradient that are summed in one exchange."""


class _World:
    """This process's place among the ranks."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self.working = False
        self.board: RankStatus | None = None


_world = _World()


# --- Rank and size --------------------------------------------------------------------------------


def rank() -> int:
    """Return the number of this process, from 0. Rank 0 alone writes."""
    return _world.rank


def size() -> int:
    """Return the number of processes."""
    return _world.size


def launched() -> tuple[int, int]:
    """Return rank and size that a launcher such as torchrun gave this process; (0, 1) without one.

    Raises:
        ConfigurationError: the launcher's environment variables are incomplete.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    try:
        found = int(os.environ.get("RANK", "0")), int(os.environ["WORLD_SIZE"])
    except ValueError:
        found = -1, 0
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if not 0 <= found[0] < found[1] or (found[1] > 1 and missing):
        raise ConfigurationError(
            f"the environment says WORLD_SIZE={os.environ.get('WORLD_SIZE')} and "
            f"RANK={os.environ.get('RANK')}"
            + (f" without {', '.join(missing)}" if missing else "")
            + ": start several processes with `torchrun --nproc-per-node N -m trivium …`, or unset "
            "WORLD_SIZE and RANK for one process"
        )
    return found


def is_first() -> bool:
    """Return whether this is the first process, or the only one, also before they join."""
    return os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ


def local_rank() -> int:
    """Return the number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def own_device(device: str) -> str:
    """Return this rank's device for one that a rank saved: ``cuda:0`` is the first one's."""
    return device.partition(":")[0] if _world.size > 1 else device


def join() -> None:
    """Join the processes that the launcher started; return when all have. Alone, do nothing."""
    own_rank, count = launched()
    if count == 1 or _world.size > 1:
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        if local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(local_rank())
    store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    board = RankStatus(store, own_rank, count, disconnect)
    try:
        dist.init_process_group(
            backend, store=store, rank=own_rank, world_size=count, timeout=TIMEOUT
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"the {count} processes cannot reach each other: {reason}") from None
    _world.rank, _world.size, _world.board = own_rank, count, board
    board.start()
    atexit.register(_leave)


def _leave() -> None:
    board, _world.board = _world.board, None
    if board is not None:
        board.leave()
    disconnect()


def disconnect() -> None:
    """Close the connections to the other ranks."""
    import torch.distributed as dist

    with suppress(Exception):
        dist.destroy_process_group()


# --- Division of work -----------------------------------------------------------------------------


def own(items: Sequence[T]) -> list[T]:
    """Return this rank's share of items that every rank has: every ``size``-th one."""
    return list(items[_world.rank :: _world.size])


def in_order(by_rank: Sequence[Sequence[T]], count: int) -> list[T]:
    """Return what all ranks have for their ``own`` of ``count`` items, in the items' order."""
    ranks = len(by_rank)
    return [by_rank[i % ranks][i // ranks] for i in range(count)]


def may_be_aborted() -> bool:
    """Return whether an error raised now, by a signal, would reach all ranks (or the only one)."""
    return _world.size == 1 or _world.working


# --- Exchanges ------------------------------------------------------------------------------------


def gather(what: str, make: Callable[[], T], plan: object = None) -> list[T]:
    """Return ``make()`` of every rank, by rank.

    Tensors of other ranks are on this rank's device. If ``make`` raises on one rank, all raise: the
    others a TriviumError that names it.

    Args:
        what: what is exchanged, for messages.
        make: this rank's work.
        plan: what all ranks must agree on.

    Raises:
        TrainingError: ranks disagree, or one of them is lost.
    """
    if _world.size == 1:
        return [make()]
    value: Any = None
    error: BaseException | None = None
    try:
        _world.working = True
        value = make()
        _world.working = False
    except BaseException as raised:  # raised again below, on every rank
        _world.working = False
        error = raised
    replies = [_loads(x) for x in _exchange(what, plan, _dumps((value, _failure(error))))]
    failures = {r: failure for r, (_, failure) in enumerate(replies) if failure is not None}
    if failures:
        # An interruption that reached some ranks only matters less than a failure.
        first = min(failures, key=lambda r: (failures[r][0], r))
        if error is not None and failures[_world.rank][0] == failures[first][0]:
            raise error
        raise _failed_on(first, *failures[first])
    values = [found for found, _ in replies]
    values[_world.rank] = value
    return values


def from_rank_0(what: str, make: Callable[[], T]) -> T:
    """Return rank 0's ``make()`` on every rank; a failure is raised on all."""
    first: Any = gather(what, lambda: make() if _world.rank == 0 else None)[0]
    return first


def agree(what: str, plan: object) -> None:
    """Raise TrainingError on all ranks unless their plans are equal."""
    if _world.size > 1:
        _exchange(what, plan, b"")


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all ranks, with the same bits on every rank.

    A parameter without a gradient on some ranks counts as zero there, and without one on all ranks
    it stays without.
    """
    if _world.size == 1:
        return
    import torch

    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    _all_reduce(present, largest=True)
    trained = [p for p, has in zip(parameters, present.tolist(), strict=True) if has]
    for bucket in _buckets(trained):
        wide = torch.promote_types(bucket[0].dtype, torch.float32)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([g.reshape(-1).to(wide) for g in gradients])
        _all_reduce(flat)
        summed = flat.split([p.numel() for p in bucket])
        for parameter, gradient, total in zip(bucket, gradients, summed, strict=True):
            parameter.grad = gradient.copy_(total.view_as(gradient))


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield parameters in order, few enough at a time that their flat copy is small."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        kinds = {(p.dtype, p.device) for p in (*bucket, parameter)}
        if bucket and (len(kinds) > 1 or sum(p.numel() for p in (*bucket, parameter)) > BUCKET):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _exchange(what: str, plan: object, payload: bytes) -> list[bytes]:
    """Return the payload of every rank, after checking that all are at the same point."""
    import torch

    label = hashlib.blake2b(f"{what}\0{plan!r}".encode(), digest_size=7).digest()
    header = torch.tensor([int.from_bytes(label, "big"), len(payload)])
    headers = torch.stack(_all_gather(what, header))
    if len(headers[:, 0].unique()) > 1:
        _raise_disagreement(what)
    lengths = headers[:, 1].tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(payload)] = torch.tensor(bytearray(payload), dtype=torch.uint8)
    found = _all_gather(what, padded) if len(padded) else [padded] * _world.size
    return [x[:length].numpy().tobytes() for x, length in zip(found, lengths, strict=True)]


def _raise_disagreement(what: str) -> NoReturn:
    import torch

    text = torch.zeros(64, dtype=torch.uint8)
    encoded = what.encode()[:64]
    text[: len(encoded)] = torch.tensor(bytearray(encoded), dtype=torch.uint8)
    found = [
        bytes(x.tolist()).rstrip(b"\0").decode(errors="replace") for x in _all_gather("", text)
    ]
    if len(set(found)) == 1:
        raise TrainingError(
            f"the ranks have different plans for {what}: they must read the same configuration and "
            "data, with the same versions, on processors of one kind"
        )
    places = ", ".join(f"rank {r} at {place}" for r, place in enumerate(found))
    raise TrainingError(f"the ranks are at different points of the run: {places}")


def _all_gather(what: str, values: Tensor) -> list[Tensor]:
    import torch
    import torch.distributed as dist

    found = [torch.empty_like(values) for _ in range(_world.size)]
    _collective(what, lambda: dist.all_gather(found, values))
    return found


def _all_reduce(values: Tensor, *, largest: bool = False) -> None:
    import torch.distributed as dist

    operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
    _collective("the sum of gradients", lambda: dist.all_reduce(values, operation))


def _collective(what: str, communicate: Callable[[], Any]) -> None:
    board = _world.board
    assert board is not None, "ranks have joined before they communicate"
    board.at = what
    try:
        communicate()
    except RuntimeError as error:
        raise board.lost(what, error) from None


# --- Values and failures as bytes -----------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """Pickles tensors by their numbers. Only ranks of one run exchange pickles."""

    def reducer_override(self, obj: Any) -> Any:
        import torch

        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        numbers = obj.detach().cpu().contiguous()
        data = numbers.reshape(-1).view(torch.uint8).numpy().tobytes()
        return _tensor, (data, numbers.dtype, tuple(numbers.shape), obj.device.type)


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Tensor:
    """Return a tensor of another rank, on this rank's device of the same kind."""
    import torch

    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(shape).to(device)


def _dumps(value: object) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


def _loads(data: bytes) -> Any:
    return pickle.loads(data)


_Failure = tuple[bool, type[BaseException], str]
"""Whether it is an interruption, the class of the error, and its message."""


def _failure(error: BaseException | None) -> _Failure | None:
    """Return what other ranks need to know of an error."""
    if error is None:
        return None
    if isinstance(error, KeyboardInterrupt):
        return True, type(error), str(error)
    if isinstance(error, TriviumError):
        return False, type(error), str(error)
    return False, TrainingError, f"{type(error).__name__}: {error}"


def _failed_on(rank: int, interrupted: bool, kind: type[BaseException], text: str) -> BaseException:
    """Return the error that the other ranks raise."""
    message = text if interrupted else f"rank {rank}: {text}"
    try:
        return kind(message)
    except TypeError:  # An error with further arguments, which stay on their rank.
        return TrainingError(message)


def final_message(text: str) -> str | None:
    """Return the message with which a failed run ends; None if another rank prints it."""
    board = _world.board
    if board is None:
        return text if is_first() else None
    if not board.prints(text):
        return None
    return text if _world.rank == 0 or text.startswith("rank ") else f"rank {_world.rank}: {text}"
