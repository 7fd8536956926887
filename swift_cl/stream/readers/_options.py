"""What the readers' settings have in common. A module of this folder whose name starts with _ is no format."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

INPUT = "{input}"


class Options(BaseModel):
    """Settings of a reader; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _has_input(template: str) -> str:
    if INPUT not in template:
        raise ValueError(f"expected a text with {INPUT} where the question goes")
    return template


Prompt = Annotated[str, AfterValidator(_has_input)]


def fill(template: str, text: str) -> str:
    """The template with the text in its place; braces in either mean nothing else."""
    return template.replace(INPUT, text)


class ShareOptions(Options):
    """One task's share of a file that holds all tasks.

    Attributes:
        task: which one, counted from 0.
        tasks: how many there are.
    """

    task: int = Field(default=0, ge=0)
    tasks: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _is_one_of_them(self) -> "ShareOptions":
        if self.task >= self.tasks:
            raise ValueError(f"task {self.task} is not one of {self.tasks}, which are counted from 0")
        return self

    def share(self, total: int) -> range:
        """The positions of this task: equal shares in order, the first one with the remainder."""
        size = total // self.tasks
        first = total - size * (self.tasks - 1)
        start = 0 if self.task == 0 else first + (self.task - 1) * size
        return range(start, start + (first if self.task == 0 else size))
