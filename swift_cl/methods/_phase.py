"""One of several trainings of a stage."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """One of the trainings of a stage, on the same rows and in the same command.

    Attributes:
        name: unique within the stage; `ctx.phase` while it runs.
        flags: what differs from the stage's own flags. A phase before the last may name another `cl_method` and what
            that one needs: it is then a first stage of that method, from the base model, and gets no flag of this one.
    """

    name: str
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def other_method(self) -> bool:
        """Whether it is a stage of another method."""
        return "cl_method" in self.flags
