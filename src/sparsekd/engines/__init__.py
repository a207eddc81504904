"""A student's passages as the index, or the feed, of a search engine; and the student itself as an ONNX graph.

``catalogue`` says which engines there are; each has a writer in the file of its name. ``vectors`` is what they read, ``names`` what
they call a dim, ``quantisation`` what their weights lose. ``exporting`` publishes a folder. Imports no torch.
"""
