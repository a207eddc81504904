"""Exports the one student of a working directory for a search engine, by the command line: python export_student.py RECIPE."""

from __future__ import annotations

from pathlib import Path

if __name__ == "__main__":
    from sparsekd.cli import app

    [student] = Path("cache/students").glob("[!.]*[!k]")  # not KEY.work
    app(["export", "engine", "anserini", str(student), "collection", "out", "--indexes", "cache/indexes", "--overwrite"])
