"""Rankings, TREC run files, measures, baselines and sparsity figures: what every system is compared by.

Cheap to import; torch is loaded by the functions that run a model.
"""
