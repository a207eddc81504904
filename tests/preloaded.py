"""Imported once, by the server that tests fork processes from: what stages import."""

from __future__ import annotations

import gc

from sparsekd.quiet import quieten_libraries

quieten_libraries()  # as a stage does before it imports them

import bm25s  # noqa: E402, F401
import datasets  # noqa: E402, F401
import faiss  # noqa: E402, F401
import ir_measures  # noqa: E402, F401
from sentence_transformers import CrossEncoderTrainer, SparseEncoderTrainer  # noqa: E402, F401
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel  # noqa: E402, F401

gc.collect()
gc.freeze()  # collections in forked processes then neither look at nor copy what was imported
