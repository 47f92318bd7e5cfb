"""Checkpoint files: every byte of a checkpoint passes through this room.

It may import `state` and `errors`; it never imports the store, so that its helpers need no database.
"""
