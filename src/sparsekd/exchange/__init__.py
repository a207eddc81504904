"""Teacher scores in other projects' layouts: into the score bank, and out of a score table.

``layouts`` says which there are and what each carries, ``readers`` and ``writers`` know their files, ``importing`` and
``exporting`` do the work. Nothing is guessed: a missing score, an unknown id or two scores of one pair are refused with their
place, before anything is written. Imports no torch.
"""
