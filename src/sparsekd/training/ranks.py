"""The processes of one training run: ``torchrun`` and ``accelerate launch`` start several of them, each with a rank.

Alone, everything here is free and does nothing. Of several, the first does all the work around training (stage 1, publishing,
checkpoints, the log) while the others wait for its word; in training all take part. Collectives are few, small and in a fixed
order, so that the same number of processes gives the same bits.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BUCKET_ELEMENTS = 1 << 23  # 32 MB of float32 are averaged at a time, beside the gradients themselves
_WAITING_DAYS = 30  # the others wait as long as stage 1 takes; the launcher ends them if the first process dies
_LEAVING_SECONDS = 300  # as long as torch waits for a process that is slow to start
_DONE = "done"
_said: list[str] | None = None  # by the first process while it leads


def num_processes() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if _joined() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if _joined() else int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process does what is done once."""
    return rank() == 0


def local_device(device: str) -> str:
    """Return the device of this process: of several on one machine, each takes the CUDA device of its local rank."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and num_processes() > 1 else device


def join(device: str) -> None:
    """Meet the other processes that the launcher started; returns at once where there are none.

    Once joined, transformers saves in the first process only, and what is built by way of a saved folder is built by it alone.
    """
    if num_processes() == 1 or _joined():
        return
    if device == "cuda":
        torch.cuda.set_device(local_device(device))
    store = dist.PrefixStore("training", _store())  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank(), world_size=num_processes())


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """In the first process: ``call`` the others until the context ends, and let them go then.

    Where no launcher keeps the store, this waits until each of them has heard that: the store ends with this process.
    """
    global _said
    _said = []
    try:
        yield
    finally:
        _say(_DONE)
        _said = None
    if not _has_launchers_store():
        others = [f"left {other}" for other in range(1, num_processes())]
        try:
            _store().wait(others, datetime.timedelta(seconds=_LEAVING_SECONDS))
        except dist.DistStoreError:
            logger.warning(
                "ranks: not all of %d other processes ended within %d s of this one; what it made is whole, see what they logged",
                len(others),
                _LEAVING_SECONDS,
            )


def words() -> Iterator[str]:
    """In every other process: yield the key of each student that the first one trains, as it comes to it, until it is done."""
    for number in itertools.count():
        store = _store()
        store.wait([f"word {number}"], datetime.timedelta(days=_WAITING_DAYS))
        word = store.get(f"word {number}").decode()
        if word == _DONE:
            store.set(f"left {rank()}", "")
            return
        yield word


def call_others(key: str) -> None:
    """Have the processes that wait in ``words`` train this student too; nothing outside ``leading``, where each came by itself."""
    if _said is not None:
        _say(key)


def _say(word: str) -> None:
    assert _said is not None
    _store().set(f"word {len(_said)}", word)
    _said.append(word)


def _has_launchers_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@functools.cache
def _store() -> Any:
    """Return the store where processes meet: the launcher's, or one that the first process keeps."""
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=is_first() and not _has_launchers_store(),
        wait_for_workers=False,
    )
    return dist.PrefixStore(f"sparsekd {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]


def from_first(value: T) -> T:
    """Return the first process's ``value`` in every process."""
    if not _joined():
        return value
    holder: list[Any] = [value]
    dist.broadcast_object_list(holder, src=0)
    first: T = holder[0]
    return first


def of_all(value: T) -> list[T]:
    """Return every process's ``value``, in the order of ranks."""
    if not _joined():
        return [value]
    values: list[Any] = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values


def largest(value: int) -> int:
    """Return the largest ``value`` of all processes."""
    if not _joined():
        return value
    holder = torch.tensor([value])
    dist.all_reduce(holder, dist.ReduceOp.MAX)
    return int(holder)


def smallest(value: float) -> float:
    """Return the smallest ``value`` of all processes."""
    return min(of_all(value))


def first_then_others(make: Callable[[], T]) -> T:
    """Return ``make()``, which the first process calls before the others: what it makes on disk, they find."""
    if not _joined():
        return make()
    made = make() if is_first() else None
    dist.barrier()
    return make() if made is None else made


def wait_for_all() -> None:
    """Return when every process has come here."""
    if _joined():
        dist.barrier()


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes, where any of them has one.

    In place of DistributedDataParallel, which counts the forward passes of a step (a student has one per route and, with cached
    losses, one per mini-batch), and whose buckets change between a run and its resumption.
    """
    if not _joined():
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    has_gradient = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32)
    dist.all_reduce(has_gradient, dist.ReduceOp.MAX)
    gradients = []
    for parameter, is_there in zip(trained, has_gradient.tolist(), strict=True):
        if is_there:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= num_processes()
        parts = torch.split(flat, [gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def share_first(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite each tensor with the first process's."""
    if _joined():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and (sum(held.numel() for held in bucket) + tensor.numel() > _BUCKET_ELEMENTS or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
