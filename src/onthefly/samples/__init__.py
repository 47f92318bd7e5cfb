"""Samples: what a model makes of every sample of a data set, and which of them to go on with.

Per-sample values are columns: NumPy arrays whose row *i* is the sample at index *i*. A scan computes them in a pass of its own,
dynamics are recorded from the batches that training computes anyway; selectors turn columns into indices.

It may import `state`, `runs` and `errors`; what needs torch (`loading`, `scan`, `embeddings`, `dynamics`) is apart from what doors
load without it (`table`, `selectors`, `recipes`, `selection`, `export`, `plot`). It never touches the store's database, and
never the session.
"""
