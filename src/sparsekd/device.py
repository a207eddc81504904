"""The device and the threads a run asks for. Nothing falls back: a device that is not there is refused before any work."""

from __future__ import annotations

from sparsekd.recipe import Run


def prepare_device(run: Run) -> str:
    """Set the compute threads, check that the device exists, and return its name; ValueError if it does not.

    Of several processes that share a stage, each takes a GPU in turn where ``device`` names none.
    """
    import torch

    if run.threads is not None:
        torch.set_num_threads(run.threads)
    device = torch.device(run.device)
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise ValueError(
                f"[run] device = {run.device!r}, but torch {torch.__version__} sees {found} CUDA devices; "
                'expected one that is there; set device = "cpu", or install a torch built for the driver of this machine'
            )
        index, of = run.part
        return f"cuda:{index % found}" if device.index is None and of > 1 else run.device
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f'[run] device = {run.device!r}, but torch sees no MPS device; set device = "cpu"')
    return run.device
