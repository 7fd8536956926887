"""Checkpoints that another engine or number of processes continues.

CHECKPOINT/portable/state.json            who wrote it: engine, processes, batch, rows of an epoch, steps
CHECKPOINT/portable/state-00001.safetensors ...   weights and moments in fp32, by parameter name

What transformers and DeepSpeed write themselves is used where engine and processes are the same (then a resumed run is
bit-identical); this is used where they are not. The method's own state and the random rows are the same for any engine.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_cl.distributed import optimizer_state, world
from swift_cl.errors import UserError
from swift_cl.io import atomic_write, read_json, write_json
from swift_cl.training.checkpoints import safetensors_complete

if TYPE_CHECKING:
    from torch import Tensor, nn

FOLDER = "portable"
FILE = "state.json"
SCHEMA = 1
FILE_BYTES = 1 << 30
"""Tensors are written in files of about this size, so that one process never holds all of them."""


@dataclass(frozen=True)
class Layout:
    """How a training is spread over processes, and where it stands.

    Attributes:
        engine: `plain` (one process, DDP), `zero0` to `zero3`, or `fsdp2`.
        micro_batch, accumulation: rows of a forward, forwards of a step, on one process.
        rows: of an epoch, (in its permutation, of these used); None where the data is streamed.
        step: optimizer steps done.
        schedule: steps of the learning-rate schedule (fewer where a loss scaler skipped some).
        optim: value of `--optim`.
        parameters: shapes of the trained parameters; empty where the checkpoint has no portable tensors.
    """

    engine: str
    processes: int
    micro_batch: int
    accumulation: int
    rows: tuple[int, int] | None = None
    step: int = 0
    schedule: int = 0
    optim: str = ""
    parameters: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def global_batch(self) -> int:
        """Rows of an optimizer step."""
        return self.processes * self.micro_batch * self.accumulation

    @property
    def text(self) -> str:
        """For a message."""
        flags = {"plain": "no DeepSpeed", "fsdp2": "--fsdp fsdp2"}
        engine = flags.get(self.engine, f"--deepspeed {self.engine}")
        return f"{self.processes} process{'es' if self.processes > 1 else ''}, {engine}"


def layout_of(args: Any, processes: int) -> Layout:
    """The layout of the training that ms-swift's arguments describe."""
    accumulation = args.training_args.gradient_accumulation_steps  # where ms-swift fills in its default
    engine = optimizer_state.engine_name(args)
    return Layout(engine, processes, args.per_device_train_batch_size, accumulation, optim=str(args.optim))


@dataclass(frozen=True)
class Resumed:
    """What a training continues.

    Attributes:
        checkpoint: its folder.
        before: the layout that wrote it.
        tensors: whether weights and optimizer come from the portable copy, not from the engine's own files.
    """

    checkpoint: Path
    before: Layout
    tensors: bool


def load(resumed_from: str | None, now: Layout, settings: Any) -> Resumed | None:
    """Look at the checkpoint that a training will continue; None where there is none, or swift_cl has not described it.

    Args:
        resumed_from: its folder.
        settings: ms-swift's arguments.

    Raises:
        UserError: it cannot be continued in this way.
    """
    if not resumed_from:
        return None
    checkpoint = Path(resumed_from)
    file = checkpoint / FOLDER / FILE
    if not file.is_file():
        if now.engine == "plain" and any(checkpoint.glob("global_step*")):
            raise UserError(f"{checkpoint}: was written by DeepSpeed; --deepspeed is needed to resume it")
        return None
    value = read_json(file)
    if not isinstance(value, dict) or value.pop("schema", None) != SCHEMA:
        raise UserError(f"{file}: not of schema {SCHEMA}; resume with the version of swift_cl that wrote it")
    before = Layout(**{**value, "rows": tuple(value["rows"]) if value["rows"] else None})
    if before.global_batch != now.global_batch:
        raise UserError(
            f"{checkpoint}: was trained with {before.global_batch} rows a step ({before.text}), now it would be "
            f"{now.global_batch} ({now.text}); set --per_device_train_batch_size and --gradient_accumulation_steps so "
            "that processes x batch x accumulation is the same, or start the stage anew with --cl_resume false"
        )
    for flag, fixed in (
        ("group_by_length", settings.group_by_length),
        ("sequence_parallel_size", settings.sequence_parallel_size > 1),
    ):
        if fixed and before.processes != now.processes:
            raise UserError(f"{checkpoint}: was written by {before.text}; with --{flag} only as many can resume it")
    own = before.engine == now.engine and (now.engine == "plain" or before.processes == now.processes)
    if not own and not before.parameters:
        raise UserError(
            f"{checkpoint}: was written by {before.text} without a portable copy (--cl_portable), so {now.text} cannot "
            "resume it; resume as before, or start the stage anew with --cl_resume false"
        )
    if not own and before.optim != now.optim:
        raise UserError(f"{checkpoint}: was trained with --optim {before.optim}, which {now.optim!r} cannot continue")
    return Resumed(checkpoint, before, tensors=not own)


def save(folder: Path, layout: Layout, trainer: Any, parameters: "Mapping[str, nn.Parameter] | None") -> None:
    """Describe a checkpoint and, given parameters, write what they and the optimizer hold; every rank must call it."""
    shapes: dict[str, list[int]] = {}
    if parameters and all(optimizer_state.is_readable(trainer, parameter) for parameter in parameters.values()):
        for number, part in enumerate(_parts(trainer, parameters, shapes), start=1):
            if world()[0] == 0:
                from safetensors.torch import save as as_bytes

                with atomic_write(folder / f"state-{number:05}.safetensors") as stream:
                    stream.write(as_bytes(part))
    if world()[0] == 0:
        write_json(folder / FILE, {"schema": SCHEMA, **asdict(layout), "parameters": shapes})


def _parts(
    trainer: Any, parameters: "Mapping[str, nn.Parameter]", shapes: dict[str, list[int]]
) -> "Iterator[dict[str, Tensor]]":
    """The tensors in parts of FILE_BYTES (on ranks other than 0 they are gathered with the others and not kept)."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, parameter in parameters.items():
        state = optimizer_state.read_state(trainer, parameter)
        shapes[name] = list(state[optimizer_state.WEIGHT].shape)
        if world()[0] == 0:
            part |= {f"{key}/{name}": tensor.cpu().contiguous().clone() for key, tensor in state.items()}
        size += sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        if size >= FILE_BYTES:
            yield part
            part, size = {}, 0
    if size:
        yield part


def restore(resumed: Resumed, trainer: Any, parameters: "Mapping[str, nn.Parameter]") -> None:
    """Put weights, optimizer and learning-rate schedule where the checkpoint had them; every rank must call it.

    Raises:
        UserError: the checkpoint is of other parameters, or damaged.
    """
    from swift_cl.distributed.tensors import full_shape

    folder, before = resumed.checkpoint / FOLDER, resumed.before
    wanted = {name: list(full_shape(parameter)) for name, parameter in parameters.items()}
    differing = sorted(n for n in wanted.keys() | before.parameters.keys() if wanted.get(n) != before.parameters.get(n))
    if differing:
        raise UserError(f"{folder / FILE}: other trained parameters than now: {', '.join(differing[:5])}")
    optimizer_state.write_states(trainer, parameters, _reader(folder))
    optimizer_state.set_steps(trainer, before.step)
    _advance(trainer.lr_scheduler, before.schedule)


def _reader(folder: Path) -> "Callable[[str], dict[str, Tensor]]":
    """name -> its tensors, read from disk when they are asked for."""
    from safetensors import safe_open

    where: dict[str, Any] = {}  # by key the file that has it
    for file in sorted(folder.glob("state-*.safetensors")):
        if not safetensors_complete(file):
            raise UserError(f"{file}: was cut off while it was written")
        stream: Any = safe_open(file, framework="pt")
        where |= dict.fromkeys(list(stream.keys()), stream)
    keys: dict[str, list[str]] = {}
    for key in where:
        keys.setdefault(key.partition("/")[2], []).append(key)

    def state_of(name: str) -> "dict[str, Tensor]":
        if name not in keys:
            raise UserError(f"{folder}: the tensors of {name} are missing")
        return {key.partition("/")[0]: where[key].get_tensor(key) for key in keys[name]}

    return state_of


def schedule_steps(scheduler: Any) -> int:
    """How many steps a learning-rate schedule has done."""
    return int(getattr(getattr(scheduler, "scheduler", scheduler), "last_epoch", 0))


def _advance(scheduler: Any, steps: int) -> None:
    """Take a schedule that has just been made to where it was: it is a function of its steps."""
    import warnings

    from torch.optim.lr_scheduler import ReduceLROnPlateau

    schedule = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps DeepSpeed's
    if isinstance(schedule, ReduceLROnPlateau):
        raise UserError("--lr_scheduler_type reduce_lr_on_plateau: its state is resumed by the same engine only")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects an optimizer step before
        for _ in range(steps):
            schedule.step()
