"""Where stage 1 runs: in this process, in workers on this machine, or in workers on a Ray cluster.

A worker is a process that carries the whole stage out over the cache it shares with the others (``bank/sharing.py``): whoever dies
leaves its shards to the rest, and the result is that of one process. So a runner only starts processes, starts again those that
were killed, and passes on how they ended; nothing is sent between them but the recipe. Imports no torch and no Ray.
"""

from sparsekd.runners.local import LocalWorkers as LocalWorkers
from sparsekd.runners.supervision import Ended as Ended
from sparsekd.runners.supervision import Task as Task
from sparsekd.runners.supervision import Workers as Workers
from sparsekd.runners.supervision import WorkersError as WorkersError
from sparsekd.runners.supervision import supervise as supervise
