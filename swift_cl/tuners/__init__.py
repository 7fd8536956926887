"""Tuners that ms-swift lacks, registered in its `tuners_map` when a command of ours starts."""

import importlib.metadata

ENTRY_POINT_GROUP = "swift_cl.tuners"


def register_tuners() -> None:
    """Register third-party tuners of the entry-point group `swift_cl.tuners` in ms-swift's table.

    An entry point names a subclass of ms-swift's `Tuner`; its name becomes a value of `--tuner_type`.
    """
    entries = list(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))
    if entries:
        from swift.tuner_plugin import tuners_map

        for entry in entries:
            tuners_map[entry.name] = entry.load()
