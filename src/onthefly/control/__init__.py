"""Steering: what may be asked of a session, and the moment between two steps at which it is done.

`commands` is torch-free, so that doors can build commands without loading torch. The rest runs inside the
training process. This room may import `runs`, `checkpoints`, `state`, `store` and `errors`, never a door.
"""
