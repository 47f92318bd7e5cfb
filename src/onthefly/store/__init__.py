"""The store: what happened and what is asked, where every door and the training process can read it.

The training process only appends to its journal (`journal`); `projection` turns journals into the database's
tables (`schema`), exactly once, in whichever process does it; `store` writes requests; `catalog` changes the list of
checkpoints where no session does; `queries` reads; `liveness` tells whether a session's process still runs. This room
may import `errors`, `runs.names`, SQLAlchemy, NumPy and the standard library. It never imports torch, so that a door
answers at once, and it never waits for training.
"""
