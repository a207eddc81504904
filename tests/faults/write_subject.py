"""Writes one subject once, as one of several processes: python write_subject.py STAGE ROOT [NAME]."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    from subjects import SUBJECTS

    SUBJECTS[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:]).write()
