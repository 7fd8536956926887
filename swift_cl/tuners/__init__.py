"""Tuners that ms-swift lacks, registered in its `tuners_map` when a command of ours starts."""


def register_tuners() -> None:
    """Make ms-swift and PEFT know our tuners and those of the entry-point group `swift_cl.tuners`.

    Only in a process that trains or serves: it imports ms-swift, and with it torch.
    """
    from swift_cl.tuners.bridge import register

    register()
