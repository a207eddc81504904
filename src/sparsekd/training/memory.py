"""The memory of one training step, estimated before the first: measured on a few rows, drawn out to the whole batch.

Counted is what torch allocates (activations, gradients, the loss's vectors), at its peak, and the optimizer's state, which comes
with the first step. Memory that cannot be had is refused with the largest batch that fits, where a machine would end the run
without a word.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekd.recipe import Recipe
from sparsekd.training import ranks

if TYPE_CHECKING:
    from sparsekd.training.trainer import DistillationTrainer

logger = logging.getLogger(__name__)

_ROWS_SAMPLED = 512
_GROWTH = 1.5  # peak of twice the rows over peak of the rows from which on rows outweigh what a step holds whatever its rows
_MOMENTS = 2  # of AdamW, which stay
_UPDATE = 3  # gradients, and as much again twice while AdamW computes: what its update holds beside the moments
_SLACK = 1.1  # allocator rounding, and scratch of matrix products, which torch does not count


@dataclass(frozen=True)
class StepMemory:
    """Bytes a step needs beside what is loaded, as a function of its rows and of how many are embedded at once."""

    fixed: float
    """What a step holds whatever its rows: gradients, and the optimizer's state, which stays."""
    per_row: float
    """Of a row's vectors and their gradients; without mini-batches of its activations too."""
    per_row_at_once: float = 0.0
    """Of the activations of one text of a mini-batch; 0 without mini-batches."""
    at_least: float = 0.0
    """What the optimizer's update needs, when activations are gone."""

    def of(self, rows: int, mini_batch_size: int = 0) -> float:
        """Return the bytes of a step of ``rows``."""
        step = self.fixed + self.per_row * rows + self.per_row_at_once * mini_batch_size
        return _SLACK * max(step, self.at_least)

    def rows_that_fit(self, available: float, mini_batch_size: int = 0) -> int:
        """Return the most rows whose step fits; 0 if not even one does."""
        free = available / _SLACK - self.fixed - self.per_row_at_once * mini_batch_size
        return max(0, math.floor(free / self.per_row)) if self.per_row > 0 and self.at_least * _SLACK <= available else 0

    def mini_batch_that_fits(self, available: float, rows: int) -> int:
        """Return the most rows embedded at once in a step of ``rows``; 0 if not even one fits."""
        free = available / _SLACK - self.fixed - self.per_row * rows
        return max(0, math.floor(free / self.per_row_at_once)) if self.per_row_at_once > 0 else 0


def check_memory(recipe: Recipe, trainer: DistillationTrainer) -> None:
    """Raise ValueError, naming the largest batch that fits, if a step of the trainer needs more memory than there is.

    Call it where training will run (``fast_student``); it changes nothing that training sees.
    """
    from sparsekd.training.losses import build_loss

    model, rows, collator = trainer.model, trainer.train_dataset, trainer.data_collator
    batch_size = min(trainer.args.per_device_train_batch_size, len(rows))
    places = list(range(0, len(rows), max(1, len(rows) // _ROWS_SAMPLED)))[:_ROWS_SAMPLED]
    is_packed = all(column.transformer.can_flatten_inputs for column in collator.tokens.values())
    tokens_per_row = [collator.num_tokens(rows[place]) for place in places]
    chosen = representative_rows(tokens_per_row, batch_size, packed=is_packed, count=batch_size)
    probes = [rows[places[place]] for place in chosen]
    loss = build_loss(model, recipe, document_frequency=trainer.document_frequency)  # the trainer's own is to see real batches only
    loss.to(model.device)

    def step(num_rows: int, at_once: int | None) -> torch.Tensor:
        if at_once is not None:
            loss.mini_batch_size = at_once
        return trainer.loss_of(loss, collator(probes[:num_rows]))

    mini_batch_size = getattr(loss, "mini_batch_size", None)
    available = ranks.smallest(available_bytes(model.device))
    memory = measure_step(model, step, batch_size, mini_batch_size, available=available)
    check_fits(memory, batch_size, mini_batch_size, available=available, num_processes=ranks.num_processes())
    needed = _gigabytes(memory.of(batch_size, mini_batch_size or 0))
    logger.info("memory: a step of %d rows needs about %s of %s", batch_size, needed, _gigabytes(available))


def measure_step(
    model: torch.nn.Module,
    step: Callable[[int, int | None], torch.Tensor],
    batch_size: int,
    mini_batch_size: int | None = None,
    *,
    available: float = math.inf,
) -> StepMemory:
    """Measure ``step(rows, at_once)``, which returns the loss of so many rows, ``at_once`` embedded together if it is a number.

    Rows are doubled until the peak grows with them (it is the largest of several, of which some do not) or the batch is reached;
    never beyond a quarter of what is ``available``, unless one row needs more. Costs about the time of one step at most.
    Random numbers and buffers stay as they were, gradients are left unset.
    """
    device = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in trained)

    def peak(rows: int, at_once: int | None) -> int:
        found = _peak_bytes(lambda: step(rows, at_once).backward(), device)  # type: ignore[no-untyped-call]
        for parameter in trained:
            parameter.grad = None
        return ranks.largest(found)

    with _as_before(model, device):
        fixed, per_row, per_row_at_once = _drawn_out(peak, batch_size, mini_batch_size, available / 4)
    return StepMemory(fixed + _MOMENTS * weights, per_row, per_row_at_once, (_MOMENTS + _UPDATE) * weights)


def _drawn_out(
    peak: Callable[[int, int | None], int], batch_size: int, mini_batch_size: int | None, most: float
) -> tuple[float, float, float]:
    """Return the peak's part that is fixed, by row, and by row at once, from peaks of few rows that stay below ``most``."""
    is_cut = mini_batch_size is not None
    limit = batch_size if mini_batch_size is None else min(batch_size, mini_batch_size)
    rows, found = 1, float(peak(1, 1 if is_cut else None))
    fewer, smaller = 0, 0.0
    while rows < limit and (fewer == 0 or found < _GROWTH * smaller) and 2 * found <= most:
        fewer, smaller = rows, found
        rows = min(2 * rows, limit)
        found = float(peak(rows, rows if is_cut else None))
    if fewer == 0:  # a second row is not wanted, or would hardly fit: all of it is the row's
        return 0.0, found, 0.0
    slope = max(0.0, (found - smaller) / (rows - fewer))
    if not is_cut or rows == batch_size:
        return max(0.0, found - rows * slope), slope, 0.0
    more = min(2 * rows, batch_size)
    per_row = max(0.0, (peak(more, rows) - found) / (more - rows))
    per_row_at_once = max(0.0, slope - per_row)
    return max(0.0, found - rows * (per_row + per_row_at_once)), per_row, per_row_at_once


@contextlib.contextmanager
def _as_before(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Train while the context lasts; mode, buffers and random numbers are then as they were."""
    was_training, buffers = model.training, [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    model.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        model.train(was_training)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def check_fits(memory: StepMemory, rows: int, mini_batch_size: int | None, *, available: float, num_processes: int = 1) -> None:
    """Raise ValueError, with the largest batch that fits, if a step of ``rows`` here needs more than ``available`` bytes."""
    needed = memory.of(rows, mini_batch_size or 0)
    if needed <= available:
        return
    found = f"[training] batch_size = {rows * num_processes}: a step needs about {_gigabytes(needed)} beside what is loaded"
    have = f"{_gigabytes(available)} are free{f' for each of {num_processes} processes' if num_processes > 1 else ''}"
    fitting = memory.rows_that_fit(available, mini_batch_size or 0) * num_processes
    advice = [f"batch_size = {fitting} is the largest that fits"] if fitting else []
    if mini_batch_size is None:
        advice.append("or embed fewer rows at once with mini_batch_size (exact, one forward pass more)")
    elif smaller := memory.mini_batch_that_fits(available, rows):
        advice.append(f"mini_batch_size = {smaller} is the largest that fits this batch_size")
    if not fitting:
        advice.append("not even one row fits: lower [student] max_length or [labels] num_negatives, or take a smaller model")
    raise ValueError(f"{found}, {have}; {', '.join(advice)}")


def representative_rows(tokens_per_row: Sequence[int], batch_size: int, *, packed: bool, count: int) -> list[int]:
    """Return the places of ``count`` rows that stand for the largest batch of ``batch_size`` rows to come.

    Padded, a batch is as long as its longest text, so these are the longest rows. Packed, a batch's tokens are the sum of its
    rows': rows nearest to the mean plus 4 standard errors, which a batch exceeds once in 30,000.
    """
    mean = sum(tokens_per_row) / len(tokens_per_row)
    variance = sum((tokens - mean) ** 2 for tokens in tokens_per_row) / len(tokens_per_row)
    target = mean + 4 * math.sqrt(variance / batch_size) if packed else max(tokens_per_row)
    places = sorted(range(len(tokens_per_row)), key=lambda place: (abs(tokens_per_row[place] - target), place))
    return [places[number % len(places)] for number in range(count)]


def available_bytes(device: torch.device) -> float:
    """Return the memory a step can have: of the card, or of this machine within the limits on this process; inf if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(_free_on_machine() / sharing, _free_in_group() / sharing, _free_address_space())


def _free_on_machine() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    kilobytes = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines)}
    return float(kilobytes.get("MemAvailable", "inf")) * 1024


def _free_in_group() -> float:
    """Return what is left under the control group's limit, page cache that can go not counted as used."""
    for limit, used, reclaimable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            folder = Path("/sys/fs/cgroup")
            most = float((folder / limit).read_text(encoding="ascii").strip().replace("max", "inf"))
            now = float((folder / used).read_text(encoding="ascii"))
            statistics = (folder / limit).with_name("memory.stat").read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):
            continue
        cache = sum(float(line.split()[1]) for line in statistics if line.split()[0] == reclaimable)
        return most - now + cache
    return math.inf


def _free_address_space() -> float:
    """Return what is left under ``ulimit -v``."""
    try:
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        now = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return math.inf
    return math.inf if most == resource.RLIM_INFINITY else float(most - now)


def _peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    if device.type == "cuda":
        before: int = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        most: int = torch.cuda.max_memory_allocated(device)
        return most - before
    with _CountingAllocations() as counting:
        work()
    return int(counting.peak)


class _CountingAllocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations make while the mode lasts, and the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.living = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known_before = [tensor.untyped_storage() for tensor in _tensors((args, kwargs))]
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if all(storage is not other for other in known_before) and storage not in self._known:
                self._known.add(storage)
                size = storage.nbytes()
                self.living += size
                self.peak = max(self.peak, self.living)
                weakref.finalize(storage, self._freed, size).atexit = False
        return result

    def _freed(self, size: int) -> None:
        self.living -= size


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of an operation's arguments or results, which stand in tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
