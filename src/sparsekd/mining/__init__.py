"""Miners propose passages per training query; policy decides which become candidates.

``candidates`` and ``selection`` are cheap to import (no search library); ``miners`` runs the searches.
"""
