"""One self-contained static HTML page per experiment and per study, from artifacts and manifests.

Three steps: facts are read into plain frozen structures (``results``, ``teaching``, ``experiment``, ``study``), drawn as SVG
(``plots``) and put into templates (``page``), where everything is escaped. Loads torch only where a finished evaluation has no
examples yet.
"""
