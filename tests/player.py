"""A process that plays a session: it holds the lock, appends facts to its journal, and answers commands.

The store is the only bus, so a door cannot tell it from a training process. It loads no torch. It says `ready ID` when it
can be commanded. Options are words: `run=NAME`, `steps=N` (then it ends, finished), `deaf` (never answers),
`dies=KIND` (is killed when it gets that command), `metric=NAME` (what it logs), `notebook` (has no command line), `says=TEXT` (fails
every test with these words).
"""

import json
import os
import signal
import socket
import sys
import time

from onthefly.runs import launch
from onthefly.store.journal import Journal
from onthefly.store.liveness import SessionLock
from onthefly.store.projection import project
from onthefly.store.store import Store


class Player:
    def __init__(self, options):
        self.options = options
        self.store = Store.open(create=True)
        self.store.recover(time.time())
        self.step, self.epoch, self.generation, self.paused = 0, 0, 0, False
        resumed = os.environ.pop(launch.RESUME, None)
        self.run = resumed or self.store.create_run(options.get("run"), project="default")
        nothing = {"environment": {}, "inexact": [], "config": {"best_metric": "val_loss"}}
        self.id = self.store.create_session(
            project="default",
            run=self.run,
            pid=os.getpid(),
            host=socket.gethostname(),
            launch=None if "notebook" in options else launch.record(),
            time=time.time(),
            **nothing,
        )
        self.lock = SessionLock(self.store.lock_path(self.id))
        self.lock.acquire()
        self.journal = Journal(self.store.journal_path(self.id))
        self.loss = self.journal.series(self.run, 0, options.get("metric", "loss"))
        self.journal.fact("run", {"run": self.run, "status": "running"})
        self.event("sessionStarted", session=self.id, resumed=resumed is not None)
        self.tell()

    def event(self, kind, /, **data):
        about = {"run": self.run, "generation": self.generation, "step": self.step, "epoch": self.epoch}
        self.journal.fact("event", {"event": kind, **about, "time": time.time(), "data": data})

    def tell(self):
        status = "paused" if self.paused else "running"
        self.store.heartbeat(self.id, status=status, step=self.step, epoch=self.epoch, time=time.time())
        project(self.store, self.id)

    def train(self):
        while self.step < int(self.options.get("steps", 10**9)):
            for command in self.store.queued_commands(self.id) if "deaf" not in self.options else ():
                if command.kind == self.options.get("dies"):
                    os.kill(os.getpid(), signal.SIGKILL)
                self.answer(command)
                if command.kind == "stop":
                    return "stopped"
            if not self.paused and (self.step < 100 or "steps" in self.options):
                self.step += 1
                self.journal.metrics(self.step, self.epoch, time.time(), [self.loss, 1 / self.step])
            self.tell()
            time.sleep(0.005)
        return "finished"

    def answer(self, command):
        try:
            answer = {"status": "done", "result": self.perform(command.kind, command.arguments), "error": None}
        except KeyError as e:
            error = {"type": "MissingPartError", "message": f"no such part: {e.args[0]}", "exit_code": 6}
            answer = {"status": "failed", "result": None, "error": error}
        about = {"command": command.id, "step": self.step, "epoch": self.epoch, "time": time.time()}
        self.journal.fact("result", {**about, **answer})
        self.tell()

    def perform(self, kind, arguments):
        if kind in ("pause", "resume"):
            self.paused = kind == "pause"
            self.event(kind + "d")
            return {"paused": self.paused}
        if kind == "saveCheckpoint":
            return self.save(arguments["path"], arguments["pin"])
        if kind == "loadCheckpoint":
            return {"loaded": arguments["path"], "hash": arguments["hash"], "step": 1, "epoch": 0}
        if kind == "set":
            changed = [{"name": name, "before": 1.0, "after": value} for name, value in arguments["values"].items()]
            self.event("command", kind="set", arguments=arguments, changed=changed)
            return {"changed": changed}
        if kind == "testRun" and "says" in self.options:
            raise KeyError(self.options["says"])
        if kind == "testRun":
            return {"loss": 0.25, "samples": {"val": 10}[arguments["data"]], "seconds": 0.5}
        return {"stopped": True} if kind == "stop" else {"generation": 1}

    def save(self, path, pin):
        captured = self.journal.seq
        path = path or str(self.store.checkpoints_dir / f"{self.run}-step{self.step:08}.safetensors")
        with open(path, "w") as file:
            json.dump(self.step, file)
        digest = f"{self.step * 7919:08x}" * 8
        saved = {"path": path, "hash": digest, "size": os.path.getsize(path), "step": self.step, "epoch": self.epoch}
        about = {"run": self.run, "generation": self.generation, "time": time.time(), "reason": "manual"}
        metrics = {"val_loss": abs(self.step - 50.0)}
        self.journal.fact("checkpoint", {**saved, **about, "pinned": pin, "captured": captured, "metrics": metrics})
        return saved

    def end(self, outcome):
        self.event("finalizeRun" if outcome == "finished" else "sessionEnded", outcome=outcome)
        self.journal.fact("run", {"run": self.run, "status": "finished" if outcome == "finished" else "unfinished"})
        self.journal.fact("session", {"status": "ended", "outcome": outcome, "ended": time.time()})
        self.tell()
        self.journal.close()
        self.lock.release()
        self.store.close()


if __name__ == "__main__":
    player = Player(dict(word.partition("=")[::2] for word in sys.argv[1:]))
    print("ready", player.id, flush=True)
    player.end(player.train())
