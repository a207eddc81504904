"""The score dictionary ``{query_id: {passage_id: score}}`` as a pickle, gzipped or not, read by an unpickler that runs nothing.

A pickle may name any function and have it called. This one admits dict, str, int and float: its opcodes are checked before
anything is built, a name in the file is refused before it is looked up, and what was built is checked again, value by value.
Holds the whole file, unpacked, and its dictionary in memory.
"""

from __future__ import annotations

import gzip
import io
import pickle
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from sparsekd.collection.reading import shown
from sparsekd.exchange.opcodes import OpcodeError, check_opcodes
from sparsekd.exchange.rows import Row, checked_id, checked_score, refused

_GZIP_MAGIC = b"\x1f\x8b"
_PROTOCOL = 4


class _Forbidden(pickle.UnpicklingError):
    """The pickle names something that is not plain data."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise _Forbidden(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _Forbidden(f"a persistent id {shown(pid)}")


def read_score_dict(path: Path) -> Iterator[Row]:
    """Yield one row per query. Raises ValueError, naming what was found, if the file holds anything but such a dictionary."""
    scores = _load(path)
    if type(scores) is not dict or not scores:
        raise refused(str(path), f"{type(scores).__name__} {shown(scores)}", "{query_id: {passage_id: score}}", _REMEDY)
    for key, by_passage in scores.items():
        _check_type(str(path), "query id", key, (str, int))
        query_id = checked_id(str(path), "query id", key)
        place = f"{path}: query {shown(query_id)}"
        if type(by_passage) is not dict or not by_passage:
            raise refused(place, f"{type(by_passage).__name__} {shown(by_passage)}", "{passage_id: score}", _REMEDY)
        passages, values = [], []
        for passage_key, value in by_passage.items():
            _check_type(place, "passage id", passage_key, (str, int))
            passages.append(checked_id(place, "passage id", passage_key))
            values.append(checked_score(place, f"passage {shown(passages[-1])}", value))
            _check_type(place, f"score of {shown(passages[-1])}", value, (int, float))
        yield Row(place, query_id, passages, values)


def write_score_dict(path: Path, scores: Mapping[str | int, Mapping[str | int, float]]) -> None:
    """Write the dictionary as a gzipped pickle, the same bytes for the same scores in the same order."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=_PROTOCOL)
    pickler.dump({query_id: dict(by_passage) for query_id, by_passage in scores.items()})
    path.write_bytes(gzip.compress(stream.getvalue(), mtime=0))


_REMEDY = "write plain dict, str, int and float, e.g. {str(q): {str(p): float(s)}}"


def _load(path: Path) -> Any:
    with path.open("rb") as raw:
        is_gzip = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        raw.seek(0)
        try:
            with gzip.open(raw) if is_gzip else raw as stream:
                content = stream.read()
            check_opcodes(content)
            whole = io.BytesIO(content)
            loaded = _PlainUnpickler(whole).load()
            if whole.read(1):
                raise ValueError("bytes follow its end")
            return loaded
        except (_Forbidden, OpcodeError) as error:
            expected = "plain dict, str, int and float, nothing that a pickle would import or call"
            raise refused(str(path), str(error), expected, _REMEDY) from error
        except Exception as error:  # what a broken pickle raises is any of a dozen kinds
            kind = "cut or broken gzip" if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile) else "broken pickle"
            raise ValueError(f"{path}: {kind} ({error!r}); copy the file again") from error


def _check_type(place: str, what: str, value: object, types: tuple[type, ...]) -> None:
    if type(value) not in types:
        expected = " or ".join(each.__name__ for each in types)
        raise refused(place, f"{what} {shown(value)} ({type(value).__name__})", expected, _REMEDY)
