"""Runs: how the nodes of the lineage graph are named, and how a recorded run is started again.

It may import `errors` and the standard library. It never touches torch.
"""
