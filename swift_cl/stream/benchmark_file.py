"""What may stand in a benchmark file: the models that check it, and that its JSON schema is made from."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from swift_cl.errors import UserError

TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

SCENARIO_VIEWS = {"knowledge_editing": ("edit", "locality"), "instance_incremental": ("memorisation",)}
"""The views that a scenario's metrics are made of."""
CLASSIFICATION = ("class_incremental", "task_incremental")
"""Scenarios in which every answer is a label."""


class GenerationModel(BaseModel):
    """How answers are generated.

    Attributes:
        max_tokens: limit of an answer, in tokens; default: 512.
        temperature: 0 is greedy; default: 0.
        top_p, top_k, min_p: where sampling stops; as the endpoint understands them.
        repetition_penalty, presence_penalty, frequency_penalty: as the endpoint understands them.
        seed: of the sampling.
        stop: texts that end an answer.
        extra: further fields of the request, whatever the endpoint takes.
    """

    model_config = ConfigDict(extra="forbid")
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    extra: dict[str, Any] = {}

    def settings(self) -> dict[str, Any]:
        """What is set, `extra` beside the rest."""
        given = self.model_dump(exclude_none=True)
        return {**given.pop("extra"), **given}


class ViewModel(BaseModel):
    """Further questions about a task, which get a matrix of their own.

    Attributes:
        test: data file; default: the task's test file.
        test_options: settings of the format; they win over the task's own.
    """

    model_config = ConfigDict(extra="forbid")
    test: str | None = None
    test_options: dict[str, Any] = {}


class ProbeModel(BaseModel):
    """A task that is asked after every stage and never learned.

    Attributes:
        name: the probe's name; also the name of its column.
        test: data file, relative to the benchmark's data folder.
        format: format of the file; default: the benchmark's.
        system: system prompt of its questions; default: the template's own.
        scorers: scorers of the probe; default: the benchmark's.
        scorer_options: settings by scorer name.
        generation: limits of an answer; they win over the benchmark's key by key.
        test_limit: only the first so many rows.
        test_options: settings of the format.
    """

    model_config = ConfigDict(extra="forbid")
    name: TaskName
    test: str
    format: str | None = None
    system: str | None = None
    scorers: list[str] = []
    scorer_options: dict[str, dict[str, Any]] = {}
    generation: GenerationModel = Field(default_factory=GenerationModel)
    test_limit: int | None = Field(default=None, ge=1)
    test_options: dict[str, Any] = {}


class TaskModel(BaseModel):
    """One task of a benchmark file.

    Attributes:
        name: the task's name; also the name of its column, and part of its stage's folder name.
        train, test: data file, relative to the benchmark's data folder.
        format: format of both files; default: the benchmark's.
        system: system prompt of the stage that learns the task; default: the template's own.
        scorers: scorers of this task; default: the benchmark's.
        scorer_options: settings by scorer name; they win over the benchmark's key by key.
        generation: limits of an answer; they win over the benchmark's key by key.
        train_limit, test_limit: only the first so many rows.
        options: settings of the format for both files.
        train_options, test_options: settings of the format for one file; they win over `options`.
        views: further questions about the task, by name; they win over the benchmark's key by key.
        labels: the task's labels, or a file with them (a JSON list, or one a line), for the scenarios of
            classification; default: the answers of its training rows.
    """

    model_config = ConfigDict(extra="forbid")
    name: TaskName
    train: str
    test: str
    format: str | None = None
    system: str | None = None
    scorers: list[str] = []
    scorer_options: dict[str, dict[str, Any]] = {}
    generation: GenerationModel = Field(default_factory=GenerationModel)
    train_limit: int | None = Field(default=None, ge=1)
    test_limit: int | None = Field(default=None, ge=1)
    options: dict[str, Any] = {}
    train_options: dict[str, Any] = {}
    test_options: dict[str, Any] = {}
    views: dict[TaskName, ViewModel] = {}
    labels: list[str] | str | None = Field(default=None, min_length=1)


class BenchmarkModel(BaseModel):
    """A benchmark: tasks, the orders in which they are learned, and how answers are scored. Unknown keys are errors.

    Attributes:
        name: the benchmark's name.
        description: for people.
        data_source: where the data is to be had and how to lay it out, for people.
        format: format of the data files, see `swift-cl ls benchmarks` and assets/formats.md.
        data_dir: folder of the data files, relative to this file; default: this file's folder.
        tasks: the tasks.
        orders: task names by name of an order; default: one order `default`, as the tasks stand here.
        scorers: scorers of the tasks that name none.
        scorer_options: settings by scorer name.
        generation: limits of an answer, such as `max_tokens`.
        options: settings of the format for all tasks and both files; a task's own win, and among them those of a file.
        train_options, test_options: settings of the format for all training or all test files.
        views: further questions about all tasks, by name; each gives a matrix of its own.
        probes: tasks that are asked after every stage and never learned, such as general ability.
        scenario: names the metrics that views make, or says which labels an answer may be, see assets/formats.md.
        decoding: whether an answer may be any text, or only a visible label (for the scenarios of classification).
    """

    model_config = ConfigDict(extra="forbid")
    name: TaskName
    description: str = ""
    data_source: str = ""
    format: str = "messages"
    data_dir: str | None = None
    tasks: list[TaskModel] = Field(min_length=1)
    orders: dict[str, list[str]] = {}
    scorers: list[str] = ["similarity"]
    scorer_options: dict[str, dict[str, Any]] = {}
    generation: GenerationModel = Field(default_factory=GenerationModel)
    options: dict[str, Any] = {}
    train_options: dict[str, Any] = {}
    test_options: dict[str, Any] = {}
    views: dict[TaskName, ViewModel] = {}
    probes: list[ProbeModel] = []
    scenario: Literal["knowledge_editing", "instance_incremental", "class_incremental", "task_incremental"] | None = (
        None
    )
    decoding: Literal["free", "constrained"] = "free"


def check_classification(path: Path, model: BenchmarkModel) -> None:
    """Refuse settings of classification where the scenario is none.

    Raises:
        UserError: names the setting.
    """
    if model.scenario in CLASSIFICATION:
        return
    given = next((f"task {entry.name!r}: labels" for entry in model.tasks if entry.labels is not None), None)
    if given is None and model.decoding != "free":
        given = f"decoding {model.decoding}"
    if given is not None:
        raise UserError(f"{path}: {given} needs a scenario of classification: {' or '.join(CLASSIFICATION)}")
