"""Model families that ms-swift lacks, registered in its tables when a command of ours starts.

`NAMES` is all that the light half of the program (which imports no torch) needs to know of them.
"""

NAMES = ("t5",)
"""Values of `--model_type`, and of `--template`, that are ours."""


def register_models() -> None:
    """Make ms-swift know our models and their templates.

    Only in a process that trains or serves: it imports ms-swift, and with it torch.
    """
    from swift_cl.models.t5 import register

    register()
