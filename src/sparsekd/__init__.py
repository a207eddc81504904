"""Distil rankers into learned sparse retrievers, with teacher scores that are paid for once."""

__version__ = "0.1.0"
