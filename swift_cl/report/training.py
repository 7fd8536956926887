"""What training and asking left on disk: commands, settings, hashes, time, tokens, and the loss over the steps."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.evaluation.journal import read_journal
from swift_cl.io import read_json, read_jsonl
from swift_cl.report.charts import Chart, Line, chart, nice_ticks
from swift_cl.report.overview import as_text
from swift_cl.report.runs import ReportRun
from swift_cl.stages import STAGE_FILE

LOG_FILE = "logging.jsonl"
PLAN_FILE = "plan.json"
ARGS_FILE = "args.json"
SETTINGS = (
    "tuner_type", "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "learning_rate", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "torch_dtype", "deepspeed",
    "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm",
)  # fmt: skip
"""Settings of ms-swift that decide what a run learns; the rest is in the stage's args.json."""


@dataclass(frozen=True)
class StageRecord:
    """One finished stage.

    Attributes:
        stage: stage.json, without its schema.
        settings: those of `SETTINGS` that its args.json has.
        swift_version: the ms-swift that trained it, or None.
        losses: (step, training loss).
        flops: floating-point operations that the trainer counted, or None.
    """

    folder: str
    stage: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    swift_version: str | None = None
    losses: list[tuple[float, float]] = field(default_factory=list)
    flops: float | None = None


@dataclass(frozen=True)
class TrainingRecord:
    """What is known of a run's training.

    Attributes:
        commands: `swift-cl sft ...`, one a stage, as planned; empty for a run that a recipe trained.
        notes: files that could not be read, and why.
        asked: how the questions were asked.
        evaluations: what asking took, see `swift_cl.evaluation.journal`.
        answer_tokens: length of all answers, or None.
    """

    stages: list[StageRecord]
    commands: list[str]
    notes: list[str]
    asked: dict[str, str]
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    answer_tokens: int | None = None

    def total(self, key: str) -> float | None:
        """Sum of a number of `train` over the stages; None where a stage has none."""
        found = [record.stage.get("train", {}).get(key) for record in self.stages]
        return None if not found or None in found else sum(found)

    @property
    def versions(self) -> dict[str, str]:
        """ms-swift that trained; several where the stages had different ones."""
        found = dict.fromkeys(record.swift_version for record in self.stages if record.swift_version)
        asked = dict.fromkeys(str(row["backend"]) for row in self.evaluations if row.get("backend"))
        told = {"ms-swift": ", ".join(found)} if found else {}
        return told | ({"Answers by": ", ".join(asked)} if asked else {})

    @property
    def eval_commands(self) -> list[str]:
        """The commands that asked, each followed by those of the servers that it started."""
        found = []
        for row in self.evaluations:
            found.append(str(row.get("command")))
            found += [f"# server: {server.get('command')}" for server in row.get("servers", [])]
        return list(dict.fromkeys(found))

    @property
    def cost(self) -> list[tuple[str, str]]:
        """Totals over the stages and the askings, those that are known."""
        found = []
        seconds, steps = self.total("seconds"), self.total("steps")
        if seconds is not None:
            found.append(("Training time", duration(seconds)))
        if steps is not None:
            found.append(("Optimizer steps", f"{steps:,.0f}"))
        flops = [record.flops for record in self.stages]
        if flops and None not in flops:
            found.append(("Training FLOPs", f"{sum(f for f in flops if f is not None):.3g}"))
        if self.evaluations:
            found.append(("Asking time", self._asking_time()))
        if self.answer_tokens is not None:
            found.append(("Answer tokens", f"{self.answer_tokens:,}"))
        return found

    def _asking_time(self) -> str:
        seconds = sum(float(row.get("seconds", 0)) for row in self.evaluations)
        asked = sum(int(row.get("asked", 0)) for row in self.evaluations)
        shared = max(len(row.get("runs", [])) for row in self.evaluations)
        together = f", together with {shared - 1} more run{'s' if shared > 2 else ''}" if shared > 1 else ""
        return f"{duration(seconds)} for {asked:,} questions, server starts included{together}"

    @property
    def settings(self) -> dict[str, str]:
        """Settings by name; a value that differs between stages is given for each."""
        names = dict.fromkeys(name for record in self.stages for name in record.settings)
        found = {}
        for name in names:
            values = [as_text(record.settings.get(name)) for record in self.stages]
            found[name] = values[0] if len(set(values)) == 1 else " → ".join(values)
        return found

    @property
    def table(self) -> list[list[str]]:
        """A row a stage: name, rows, epochs, steps, last loss, seconds, processes, FLOPs, hash, hash before."""
        rows = []
        for record in self.stages:
            train, before = record.stage.get("train", {}), record.stage.get("started_from") or {}
            loss = train.get("last_loss")
            rows.append(
                [
                    record.folder,
                    *(as_text(train.get(key)) for key in ("rows", "epochs", "steps")),
                    "-" if loss is None else f"{loss:.4f}",
                    *(as_text(train.get(key)) for key in ("seconds", "processes")),
                    "-" if record.flops is None else f"{record.flops:.3g}",
                    record.stage.get("weights_sha256") or "-",
                    before.get("weights_sha256") or "base",
                ]
            )
        return rows


def duration(seconds: float) -> str:
    """`41.2 s`, `3 min 5 s` or `2 h 10 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def training_record(run: ReportRun) -> TrainingRecord:
    """Read the stages that are there; a damaged file becomes a note, it does not stop the report."""
    notes: list[str] = []

    def read(path: Path, reader: Any) -> Any:
        if not path.is_file():
            return None
        try:
            return reader(path)
        except UserError as error:
            notes.append(f"{run.label}: {error}")
            return None

    stages = []
    for name in run.rows[1:]:
        folder = run.dir / name
        stage = read(folder / STAGE_FILE, read_json)
        if not isinstance(stage, dict):
            continue
        stage.pop("schema", None)
        args = read(folder / ARGS_FILE, read_json) or {}
        log = read(folder / LOG_FILE, read_jsonl) or []
        settings = {key: args[key] for key in SETTINGS if args.get(key) not in (None, [], "")}
        flops = [row["total_flos"] for row in log if "total_flos" in row]
        stages.append(
            StageRecord(name, stage, settings, args.get("swift_version"), _losses(log), flops[-1] if flops else None)
        )
    plan = read(run.dir / PLAN_FILE, read_json)
    asked = read(run.dir / "answers" / "settings.json", read_json)
    return TrainingRecord(
        stages,
        _commands(plan) if isinstance(plan, dict) else [],
        notes,
        _asked(asked) if isinstance(asked, dict) else {},
        read_journal(run.dir),
        run.results.get("answers", {}).get("tokens"),
    )


def _asked(settings: dict[str, Any]) -> dict[str, str]:
    """How the questions were asked, where the run recorded it."""
    names = {"generation": "Generation", "history": "Earlier turns", "system": "System prompt of"}
    return {name: as_text(settings[key]) for key, name in names.items() if settings.get(key) is not None}


def _losses(log: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """(step, loss) in order; of a step that was trained twice (after a resume) the last one."""
    found: dict[float, float] = {}
    for row in log:
        step = str(row.get("global_step/max_steps", "")).split("/")[0]
        if step.isdigit() and isinstance(row.get("loss"), int | float):
            found[float(step)] = float(row["loss"])
    return sorted(found.items())


def _commands(plan: dict[str, Any]) -> list[str]:
    """The plan's stages as commands for a shell, each naming the stage that it continues."""
    commands, before = [], None
    for stage in plan.get("stages", []):
        argv = [*stage["argv"], *(["--cl_previous", before] if before else [])]
        commands.append("swift-cl sft " + shlex.join(argv))
        before = stage["dir"]
    return commands


def loss_curves(runs: Sequence[ReportRun], records: dict[str, TrainingRecord], styles: dict[str, int]) -> list[Chart]:
    """For runs of one order: a chart a stage, with a line a run; stages without a log are left out."""
    highest = max(
        [loss for run in runs for record in records[run.label].stages for _, loss in record.losses], default=0.0
    )
    top = nice_ticks(0.0, highest, 4)[-1]
    charts = []
    for index, task in enumerate(runs[0].order):
        lines = []
        for run in runs:
            for record in records[run.label].stages:
                if record.folder == run.rows[index + 1] and record.losses:
                    titles = [f"{run.label}, {task}, step {step:g}: loss {loss:.4g}" for step, loss in record.losses]
                    lines.append(Line(run.label, styles[run.label], record.losses, titles))
        if lines:
            charts.append(chart(f"stage {index + 1}: {task}", lines, (0.0, top)))
    return charts
