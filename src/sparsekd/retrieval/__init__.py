"""Search with a finished student: its index over a collection, exact search of it, and what made a score. Imports no torch.

``encoder`` is a student as something that encodes texts; ``index`` the published artifact; ``building`` finds or makes it.
"""

from sparsekd.retrieval.building import find_or_build
from sparsekd.retrieval.encoder import StudentEncoder
from sparsekd.retrieval.index import StudentIndex

__all__ = ["StudentEncoder", "StudentIndex", "find_or_build"]
