"""The demo: trains examples/digits.py in a process of its own, shows it live, and proves that it comes back bit for bit.

make demo                                             with a view, slowly enough to steer it from a second terminal
make demo DEMO_ARGS="--epochs 3 --no-view"            unattended, at full speed
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from onthefly import cli
from onthefly.client import Client
from onthefly.control import dashboard
from onthefly.store import hubs
from onthefly.store.queries import RunRow, SessionRow
from onthefly.store.store import Store

EXAMPLES = Path(__file__).resolve().parent
BETWEEN_EPOCHS = ("origin", "epoch", "end")  # reasons of checkpoints that are not in the middle of an epoch

STEER = """
Training {run}: handwritten digits, a small CNN. To steer it, type in a second terminal:

  cd {folder}{activate}

  onthefly status               what is training
  onthefly pause                hold it; `onthefly resume` lets it go on
  onthefly set 'lr*=0.1'        a tenth of the learning rate, from the next step on
  onthefly test                 how good is it? Training does not notice
  onthefly save                 a checkpoint, now; `onthefly checkpoints` lists them
  onthefly load {best:<15} back to the best checkpoint
  onthefly stop                 save and end; `onthefly resume {run}` goes on, even after kill -9 {pid}

Ctrl-C here saves and ends it, too.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--slow", type=float, metavar="SECONDS", help="wait after each step (0.1 with a view, else 0)")
    parser.add_argument("--no-view", action="store_true", help="a line for each epoch instead of a live view")
    parser.add_argument("--folder", type=Path, default=EXAMPLES.parent / "demo", help="where its store is, or will be")
    options = parser.parse_args()
    view = sys.stdout.isatty() and not options.no_view
    slow = options.slow if options.slow is not None else 0.1 if view else 0.0
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)

    for number in (signal.SIGTERM, signal.SIGHUP):  # a terminal that is closed must not leave the training behind
        signal.signal(number, interrupt)
    with Client(Store.open(folder / ".onthefly", create=True)) as client:
        arguments = ["--epochs", str(options.epochs), "--workers", str(options.workers), "--slow", str(slow)]
        session, asked = None, False
        trainer = start(client, folder, arguments)
        try:
            session = first_session(client, trainer)
            if session is not None:
                print(how_to_steer(session, folder), flush=True)
                if view:
                    dashboard.show(client.store.root, lambda words: print(words, flush=True))
                follow(client, session, trainer, view)
            trainer.wait()
        except KeyboardInterrupt:
            asked = True
            print("\nSaving ...", flush=True)
            trainer.send_signal(signal.SIGINT)
            trainer.wait()
        output = (folder / "output.txt").read_text()
        if view and (hub := hubs.running(client.store.root)) is not None:
            print(f"\nThe dashboard stays; kill {hub.pid} ends it.", flush=True)
        if 0 < trainer.returncode < 128 and not asked:  # it failed; more is a signal, less a kill
            print(output, f"The training ended with exit code {trainer.returncode}.", sep="\n", file=sys.stderr)
        if session is None:
            return 0 if asked else 1
        client.store.recover(time.time())  # it may have been killed
        # A fork, or a merge, that was gone on with is another run than the first.
        run = client.run(next(row.run for row in client.sessions() if row.id == session.id))
        if run.status != "finished":
            print(how_to_go_on(client, run))
            return 0 if asked or not trainer.returncode else 1
        print(output.splitlines()[-1])
        return prove(client, run)


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def start(client: Client, folder: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
    """Start the training, in a process group of its own: Ctrl-C in the terminal comes to the demo alone, which passes it on."""
    command = [sys.executable, str(EXAMPLES / "digits.py"), *arguments]
    env = os.environ | {"ONTHEFLY_STORE": str(client.store.root)}
    with open(folder / "output.txt", "wb") as output:
        return subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
        )


def first_session(client: Client, trainer: subprocess.Popen[bytes]) -> SessionRow | None:
    """The session of the training, once it trains. None when the process ended without."""
    known = {row.id for row in client.sessions()}
    while True:
        ended = trainer.poll() is not None
        for row in client.sessions():
            if row.id not in known and row.pid == trainer.pid and row.status != "starting":
                return row
        if ended:
            return None
        time.sleep(0.1)


def how_to_steer(session: SessionRow, folder: Path) -> str:
    script = Path(sys.prefix) / "bin" / "activate"
    activate = f"\n  source {shlex.quote(str(script))}" if script.exists() else ""
    best = f"{session.run}@best"
    return STEER.format(run=session.run, folder=shlex.quote(str(folder)), activate=activate, best=best, pid=session.pid)


def follow(client: Client, session: SessionRow, trainer: subprocess.Popen[bytes], view: bool) -> None:
    """Show the training until it ends. Raises `KeyboardInterrupt`."""
    if view:
        if cli.main(["watch", "--store", str(client.store.root), "--session", str(session.id)]) == cli.INTERRUPTED:
            raise KeyboardInterrupt
        return
    said, ended = 0, False
    while not ended:
        time.sleep(0.2)
        ended = trainer.poll() is not None
        loss, accuracy = (client.series(session.run, name) for name in ("val_loss", "val_accuracy"))
        for i in range(said, min(len(loss.values), len(accuracy.values))):
            print(f"step {loss.steps[i]:>5}  val loss {loss.values[i]:.4f}  val accuracy {accuracy.values[i]:.1%}")
            sys.stdout.flush()
            said = i + 1


def how_to_go_on(client: Client, run: RunRow) -> str:
    last = client.checkpoints(run.name)[-1:]
    saved = f"saved at step {last[0].step}" if last else "not saved yet"
    program, store = shown(Path(sys.executable).parent / "onthefly"), shown(client.store.root)
    return f"\n{run.name} is not finished; it is {saved}. To go on:\n\n  {program} resume {run.name} --store {store}\n"


def prove(client: Client, run: RunRow) -> int:
    """Train again from the middle of an epoch, in a fresh process, and compare the hashes of the two ends."""
    rows = [row for row in client.checkpoints(run.name) if row.generation == run.generation]
    chosen = [row for row in rows if row.reason not in BETWEEN_EPOCHS] or rows
    ref = f"{run.name}@{chosen[-1].step}"
    print(f"\nThe proof: onthefly verify {ref}", flush=True)
    return cli.main(["verify", ref, "--store", str(client.store.root)])


def shown(path: Path) -> str:
    """The path as one would type it here."""
    return shlex.quote(min(str(path), os.path.relpath(path), key=len))


if __name__ == "__main__":
    sys.exit(main())
