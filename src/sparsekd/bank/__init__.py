"""What is known: raw teacher scores per (query, passage) and vectors per text, keyed by content, paid for once.

``<cache>/bank/scores/<key>/`` holds one teacher, ``<cache>/bank/embeddings/<key>/`` one encoder, ``<cache>/bank/sparse/<key>/`` one
sparse encoder's queries or passages; ``sparsekd bank`` looks after all. Any number of processes on one host may read and write
at once. Imports no torch.
"""

from sparsekd.bank.embeddings import EmbeddingBank, Embeddings
from sparsekd.bank.scores import ScoreBank, TeacherScores
from sparsekd.bank.text_key import text_keys

__all__ = ["EmbeddingBank", "Embeddings", "ScoreBank", "TeacherScores", "text_keys"]
