"""Teachers: models and functions that score pairs or encode texts, and BM25, behind two protocols, and the banks they fill.

An identity says everything that can change a score and nothing that cannot; the banks are keyed by it. torch is imported only
when a model is loaded, so asking what is already banked costs no model.
"""
