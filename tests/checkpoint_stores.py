"""Stores with real checkpoints of sessions that have ended, made without a training."""

import os

import torch

from onthefly.checkpoints import sidecar
from onthefly.checkpoints.format import write
from onthefly.store import queries
from onthefly.store.journal import Journal
from onthefly.store.projection import project


def begin(store, run="baseline", config=None):
    """A run with its first session."""
    name = store.create_run(run, project="p")
    return name, again(store, name, config)


def again(store, run, config=None):
    """One more session on a run."""
    nothing = {"launch": None, "environment": {}, "inexact": [], "config": config or {}}
    return store.create_session(project="p", run=run, pid=os.getpid(), host="here", time=1.0, **nothing)


def save(store, session, run, step, *, path=None, reason="step", pinned=False, loss=None, value=None):
    """A checkpoint as a session saves it; gives its row."""
    path = path or store.checkpoints_dir / sidecar.name_for(run, step)
    tree = {"counters": {"step": step, "epoch": 0}, "model": {"w": {"$tensor": "model/w"}}}
    written = write(path, tree, {"model/w": torch.full((300,), float(step if value is None else value))})
    about = {"run": run, "generation": 0, "step": step, "epoch": 0, "reason": reason}
    sidecar.describe(path, written.hash, written.size, tree["counters"], **about)
    journal = Journal(store.journal_path(session))
    metrics = {} if loss is None else {"val_loss": loss}
    saved = {"path": str(path), "hash": written.hash, "size": written.size, "time": 2.0 + step, "pinned": pinned}
    journal.fact("checkpoint", {**about, **saved, "captured": journal.seq, "metrics": metrics})
    journal.close()
    project(store, session)
    return queries.newest_checkpoint(store, run)


def tell(store, session, kind, **data):
    """One more fact of a session."""
    journal = Journal(store.journal_path(session))
    journal.fact(kind, data)
    journal.close()
    project(store, session)


def end(store, session, run):
    """The session ends as it should."""
    tell(store, session, "run", run=run, status="unfinished")
    tell(store, session, "session", status="ended", outcome="stopped", ended=99.0)


def trained(store, steps=(0, 10, 20), **config):
    """A run of one session that has ended, with these checkpoints; gives their rows, oldest first."""
    run, session = begin(store, config={"ckpt_keep": 3, "best_metric": "val_loss", **config})
    for step in steps:
        save(store, session, run, step, reason="origin" if step == 0 else "step")
    end(store, session, run)
    return queries.checkpoints(store)
