"""What libraries say by themselves, kept to warnings: stages and commands have words of their own. Imports none of them."""

from __future__ import annotations

import logging
import os

_TALKATIVE = ("httpx", "sentence_transformers", "transformers", "datasets", "faiss", "filelock", "bm25s")


def quieten_libraries() -> None:
    """Set what libraries read from the environment when they are imported, where it is not set, and their loggers to warnings."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # transformers reports every key of a checkpoint that it leaves out; what matters of it is checked where models are built.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
