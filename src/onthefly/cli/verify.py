"""`onthefly verify`: train a recorded stretch again, and compare bit by bit."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onthefly.cli import options, render
from onthefly.errors import InexactError

if TYPE_CHECKING:
    from onthefly.remerging import MergeProof
    from onthefly.verification import Plan, Verification


@click.command("verify", short_help="Prove that a run comes back bit for bit.")
@click.argument("ref", required=False)
@click.option("--to", metavar="REF", help="The checkpoint to end at. Default: the next one of that run.")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Give up after this long.")
@options.store
@options.as_json
def verify_command(ref: str | None, to: str | None, timeout: float | None, store: Path | None, as_json: bool) -> None:
    """Start the recorded command line in a fresh process, train from the checkpoint REF to the next one of its run, and
    compare the two content hashes. Nothing of the run or its store is touched.

    A run that began from another's checkpoint (a fork, a rewind, a reset) is proved from there: its first checkpoint is the end
    of that stretch. Without REF it is the newest stretch of the store. When they differ it says in what, and the exit code is 8.

    For a run that began from a merge, REF being its name alone, the merge is computed again from its parents.
    """
    from onthefly import verification

    with options.connect(store) as client:
        if to is None and any(run.name == ref and run.kind == "merge" for run in client.runs()):
            proof = client.verify_merge(str(ref))
            click.echo(render.document(proof) if as_json else merge_text(proof))
            if not proof.equal:
                click.get_current_context().exit(InexactError.exit_code)
            return
        plan, scans = client.plan(ref, to), client.store.scans_dir
    waiting = nullcontext() if as_json else _waiting(plan)
    with options.leaving_in_order(), waiting:
        found = verification.replay(plan, scans, timeout=timeout)
    click.echo(render.document(found) if as_json else text(found))
    if not found.equal:
        click.get_current_context().exit(InexactError.exit_code)


def text(found: Verification) -> str:
    """The verdict, and the two hashes one above the other."""
    steps = found.end.step - found.start.step
    begun = f" of {found.start.run}" if found.start.run != found.run else ""
    commands = f", {found.commands} commands applied again" if found.commands else ""
    lines = [
        f"{found.run}: {steps} steps, from {found.start.step}{begun} to {found.end.step}{commands}, "
        f"again in a fresh process, {render.span(found.seconds)}",
        f"recorded  {found.recorded_hash}",
        f"replayed  {found.replayed_hash}",
    ]
    if found.equal:
        return "\n".join([*lines, click.style("equal, bit for bit", fg="green", bold=True)])
    lines.append(click.style("not equal", fg="red", bold=True))
    lines += [f"  {line}" for line in found.differences]
    lines += ["likely causes:", *(f"  {line}" for line in found.causes)]
    return "\n".join(lines)


def merge_text(proof: MergeProof) -> str:
    """The verdict on a merge that was computed again."""
    lines = [
        f"{proof.run}: {proof.strategy} of {', '.join(proof.parents)}, computed again",
        f"committed as  {proof.hash}",
    ]
    if proof.recalibrated:
        lines.append(
            f"estimated on data after the merge, and not compared: {len(proof.recalibrated)} batch-norm buffers"
        )
    if proof.equal:
        return "\n".join([*lines, click.style(f"{proof.tensors} tensors equal, bit for bit", fg="green", bold=True)])
    return "\n".join(
        [*lines, click.style("not equal", fg="red", bold=True), *(f"  {line}" for line in proof.differences)]
    )


def _waiting(plan: Plan) -> AbstractContextManager[Any]:
    from rich.console import Console

    message = f"training {plan.end.run} again, from step {plan.start.step} to {plan.end.step}"
    return Console(stderr=True).status(message)
