"""What a pickle of plain data may be made of, checked opcode by opcode before anything is built of it.

An unpickler that finds no classes is not enough: a tuple of a million levels overflows the C stack when it is hashed, and a memo
slot of number 2^28, or bytes that claim a length of 2^33, take the memory first and fail later. Costs about 0.2 µs a pair.
"""

from __future__ import annotations

import pickle
import pickletools
import re

_ALLOWED = frozenset(
    "PROTO FRAME STOP MARK EMPTY_DICT DICT SETITEM SETITEMS MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET "
    "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 STRING BINSTRING SHORT_BINSTRING FLOAT BINFLOAT "
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 "
    # Neither ids nor scores, but nothing that nests where it is hashed: the reader says which value is one.
    "NONE NEWTRUE NEWFALSE BINBYTES SHORT_BINBYTES EMPTY_LIST LIST APPEND APPENDS".split()
)
# Names what is to be imported or fetched from outside: the unpickler refuses there and reads no further.
_NAMES = frozenset("GLOBAL STACK_GLOBAL INST EXT1 EXT2 EXT4 PERSID BINPERSID".split())
_OPCODES = {ord(opcode.code): (opcode.name, opcode.arg.n if opcode.arg else 0) for opcode in pickletools.opcodes}
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def _run_pattern() -> re.Pattern[bytes]:
    """Match a run of opcodes that need no look, which is nearly all of a file.

    They are of fixed size, lines, strings of up to 32 bytes, and memo slots below 2^22, which take 64 MB at most.
    """
    fixed = [
        re.escape(bytes([code])) + b".{%d}" % size
        for code, (name, size) in _OPCODES.items()
        if name in _ALLOWED - {"STOP", "LONG_BINPUT"} and size >= 0
    ]
    short, long = (
        b"(?:%s)" % b"|".join(re.escape(length.to_bytes(width, "little")) + b".{%d}" % length for length in range(33))
        for width in (1, 4)
    )
    others = [b"\\x8c" + short, b"X" + long, b"r..[\\x00-\\x3f]\\x00", b"p[0-9]{1,6}\n", b"[VFILSg][^\n]*\n"]
    return re.compile(b"(?:%s)*+" % b"|".join([*others, *fixed]), re.DOTALL)


_RUN = _run_pattern()


class OpcodeError(ValueError):
    """An opcode that plain data has not."""


def check_opcodes(content: bytes) -> None:
    """Raise OpcodeError unless ``content`` is plain data up to its end, or up to a name, where the unpickler stops.

    Building what passes takes memory in proportion to its size, and recurses nowhere. Raises UnpicklingError if it is cut, or has a
    memo slot that no pickler writes.
    """
    place, end = 0, len(content)
    while True:
        match = _RUN.match(content, place)
        place = match.end() if match else place
        if place >= end:
            raise pickle.UnpicklingError(f"no end within its {end:,} bytes")
        code = content[place]
        name, size = _OPCODES.get(code, (f"0x{code:02x}", 0))
        if name == "STOP" or name in _NAMES:
            return
        if name not in _ALLOWED:
            raise OpcodeError(f"the opcode {name} at byte {place}")
        argument, place = _argument(content, place + 1, size)
        if "PUT" in name and not 0 <= argument < place:  # the unpickler makes room for every slot below
            raise pickle.UnpicklingError(f"memo slot {argument} before byte {place}")


def _argument(content: bytes, place: int, size: int) -> tuple[int, int]:
    """Return an argument as a number, -1 if it is none, and where the next opcode stands."""
    if size == pickletools.UP_TO_NEWLINE:
        line_end = content.find(b"\n", place)
        line = content[place : line_end if line_end >= 0 else len(content)]
        return int(line) if line.isdigit() and len(line) < 20 else -1, len(content) if line_end < 0 else line_end + 1
    width = _LENGTH_BYTES.get(size, size)
    number = int.from_bytes(content[place : place + width], "little")
    return number, place + width + (number if size in _LENGTH_BYTES else 0)
