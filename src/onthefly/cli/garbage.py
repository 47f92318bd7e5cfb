"""`onthefly gc`: what nothing needs goes from the disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onthefly.cli import options, render
from onthefly.cli.fsck import near

if TYPE_CHECKING:
    from onthefly.garbage import Collection


@click.command("gc", short_help="Remove what nothing needs.")
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    metavar="N",
    help="Keep the N newest checkpoints of each run, whatever its session was told.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@options.store
@options.as_json
def gc_command(keep: int | None, dry_run: bool, store: Path | None, as_json: bool) -> None:
    """Remove unfinished files, sidecars without checkpoints, files of removed checkpoints, files in the store's own folder
    that are in no list, folders of scans and proofs that were killed, what was measured of checkpoints that are gone,
    pictures and maps of samples that are made again when they are asked for, and what retention lets go: by the settings of
    each run's newest session, or by --keep.

    An origin, the best, what is pinned, and what a run goes on from always stay, and so does all of a run that is being trained,
    or that has lost a checkpoint. What went keeps its row, as a tombstone.
    """
    with options.connect(store) as client:
        found = client.gc(keep=keep, dry_run=dry_run)
        root = client.store.root
    click.echo(render.document(found) if as_json else text(found, root))


def text(found: Collection, store: Path) -> str:
    """What went, what stays and why, and how many bytes it was."""
    columns = (
        render.Column("WOULD GO" if found.dry_run else "REMOVED"),
        render.Column("SIZE", "right"),
        render.Column("FILE"),
        render.Column("WHAT"),
    )
    cells = [[one.kind, render.size(one.size), near(one.path, store), one.message] for one in found.removed]
    lines = [render.table(columns, cells)] if cells else []
    lines += [f"{click.style('left', fg='yellow')}  {near(Path(one.what), store)}: {one.reason}" for one in found.left]
    files = f"{len(found.removed):,} file{'' if len(found.removed) == 1 else 's'}"
    verb = "would be freed" if found.dry_run else "freed"
    total = f"{render.size(found.freed)} {verb}, {files}" if found.removed else "nothing to remove"
    return "\n".join([*lines, total])
