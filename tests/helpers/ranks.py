"""Several processes of one run, on gloo, forked from a server that has imported the package."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers.fast_path import set_default_of_models

_GUARD_SECONDS = 1200
"""Only ends a test that would hang."""


class Ended:
    """In place of a result: the process ended without one, with this exit code."""

    def __init__(self, exit_code: int | None) -> None:
        self.exit_code = exit_code


class Failed(str):
    """In place of a result: the traceback of an error that the job did not catch."""


def on_ranks(size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return ``job(*arguments)`` of every rank, or ``Ended``; the job is a function of a module.

    Like torchrun's agent, the test's process holds the store.

    Raises:
        AssertionError: the job raised an error that it does not return, or a process hangs.
    """
    context = multiprocessing.get_context("forkserver")
    _start_server(context)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    cache = os.environ.get("TRIVIUM_CACHE", "")
    processes, ends = [], []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TRIVIUM_CACHE": cache,
        }  # fmt: skip
        process = context.Process(target=_run, args=(environment, sender, job, arguments))
        process.start()
        sender.close()
        processes.append(process)
        ends.append(receiver)
    try:
        found = [_receive(process, end) for process, end in zip(processes, ends, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.join()
    failures = [x for x in found if isinstance(x, Failed)]
    assert not failures, "\n".join(failures)
    return found


def _start_server(context: ForkServerContext) -> None:
    """Start the server that imports everything once; Python 3.11 does not tell it ``sys.path``."""
    context.set_forkserver_preload(["helpers.fast_path", "helpers.rank_jobs"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()


def _receive(process: Any, end: Connection) -> Any:
    assert wait([end, process.sentinel], _GUARD_SECONDS), "a rank hangs"
    try:
        return pickle.loads(end.recv_bytes())
    except EOFError:
        process.join(_GUARD_SECONDS)
        return Ended(process.exitcode)


def _run(
    environment: dict[str, str], sender: Connection, job: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    set_default_of_models()
    try:
        result = job(*arguments)
    except BaseException:
        result = Failed(traceback.format_exc())
    sender.send_bytes(pickle.dumps(result))
