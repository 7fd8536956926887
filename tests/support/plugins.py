"""Methods as installed plug-ins: a distribution with an entry point, made in a folder."""

import os
from pathlib import Path

from tests.conftest import ROOT
from tests.support.commands import environment


def installed(site: Path, source: Path, name: str, class_name: str) -> dict[str, str]:
    """The environment in which the method `name` of the file `source` is installed."""
    info = site / f"{name}_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}.py").write_text(source.read_text(encoding="utf-8"))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}_plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[swift_cl.methods]\n{name} = {name}:{class_name}\n")
    paths = [str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**environment(), "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
