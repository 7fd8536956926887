"""`swift-cl sft`: ms-swift's SwiftSft with a method in it, and a stage folder at its end."""

import os
import shutil
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from swift.arguments import SftArguments
from swift.pipelines import SwiftSft
from swift.trainers import TrainerFactory
from swift.utils import get_logger
from transformers import HfArgumentParser, set_seed

from swift_cl import distributed
from swift_cl.errors import RunFailure, UserError
from swift_cl.generation.shared import help_out, open_shared, send_home
from swift_cl.io import read_json, read_jsonl, sha256_file, sha256_tensors, write_json, write_jsonl
from swift_cl.methods.registry import get_method
from swift_cl.stages import ADAPTER_DIR, DATA_DIR, WEIGHTS, Stage
from swift_cl.training import portable
from swift_cl.training.arguments import arguments_class, method_config, parse_stage_arguments
from swift_cl.training.before import parameter_name
from swift_cl.training.checkpointing import own_checkpointing
from swift_cl.training.checkpoints import STARTED_FILE
from swift_cl.training.engines import SHARED_BACKENDS, open_engine
from swift_cl.training.flags import flag_values
from swift_cl.training.phases import Training, drop_phases, train_phases
from swift_cl.training.probe import kept_adapter, probe_messages, record_probe
from swift_cl.training.rows import hash_of_rows, rows_of
from swift_cl.training.session import Session, overrides
from swift_cl.training.trainer import TRAINERS
from swift_cl.tuners.registry import settings_of, tuners

logger = get_logger()


@contextmanager
def _our_trainers() -> Any:
    # TrainerFactory has no argument for the trainer, so its table is exchanged for the time of one run.
    before = dict(TrainerFactory.TRAINER_MAPPING)
    TrainerFactory.TRAINER_MAPPING.update(TRAINERS)
    try:
        yield
    finally:
        TrainerFactory.TRAINER_MAPPING.update(before)


class CLSft(SwiftSft):
    """One stage. With `shared` the base model of the stage before is used again instead of being loaded a second time.

    Args:
        argv: flags as for `swift sft`, plus ours.
        shared: (base model without adapter, processor) left over by an earlier stage of the same process.
        training: which of the trainings of a stage it is; None for a stage with all of them.
    """

    args_class = SftArguments

    def __init__(
        self, argv: list[str], shared: tuple[Any, Any] | None = None, training: Training | None = None
    ) -> None:
        self._started = time.time()
        # Before anything of this stage is set up: its phases are stages like any other, one after the other.
        if training is None:
            training, shared = train_phases(argv, shared, CLSft)
        self._training, self._shared = training, shared
        args, self._previous = parse_stage_arguments(training.argv)
        self._method = get_method(args.cl_method)(method_config(args, get_method(args.cl_method)))
        self._tuner = tuners().get(args.tuner_type)
        layout = portable.layout_of(args, distributed.launched_processes())
        resumed = portable.load(args.resume_from_checkpoint, layout, args)
        distributed.start_deepspeed(args)
        tuner = self._tuner
        distributed.start_fsdp(
            args,
            has_buffers=tuner is not None and tuner.has_buffers,
            recomputes=tuner is None or "gradient_checkpointing" not in tuner.required,
        )
        super().__init__(args)
        self.session = Session(self._method, args.cl_task, Path(args.output_dir), self._previous, args.seed)
        self.session.system = args.system
        self.session.phase, self.session.phases = training.phase, training.adapters
        self.session.template = self.template
        self.session.open_engine = self._open_engine
        self.session.spread(layout, resumed, args)
        before = self._previous.train.get("rows_a_step") if self._previous is not None else None
        if before is not None and before != layout.global_batch:
            self.session.notice(f"{layout.global_batch} rows a step, the stage before had {before}")
        if distributed.world()[0] == 0:
            started = {"method": args.cl_method, "task": args.cl_task, "previous": args.cl_previous}
            write_json(Path(args.output_dir) / STARTED_FILE, started)

    def _prepare_model_tokenizer(self, **kwargs: Any) -> None:
        if self._shared is not None and not _fits(self._shared[0], self.args):
            self._shared = None
        if self._shared is None:
            super()._prepare_model_tokenizer(**kwargs)
        else:
            self.model, self.processor = self._shared
            self._prepare_generation_config()

    def _open_engine(self, weights: Path | None, backend: str) -> Any:
        if distributed.world()[1] == 1 or backend not in SHARED_BACKENDS:
            return self._open_here(weights, backend)
        return open_shared(self._open_here, weights, backend, distributed.gather_json)

    def _open_here(self, weights: Path | None, backend: str) -> Any:
        base = self._base_model(Path(self.args.model))
        return open_engine(self.args, self.model, self.processor, base, weights, backend)

    # --- data --------------------------------------------------------------------------------------------------------

    def _get_dataset(self) -> Any:
        train, val = super()._get_dataset()
        if self.args.streaming and train is not None:
            return train, val  # whether there is a usable row shows in `_finish`
        if train is None or len(train) == 0:
            raise UserError(self._no_rows())
        rows = rows_of(train, self.template.template_meta.default_system)
        if not overrides(self._method, "prepare_task"):
            self.session.prepare_rows(rows)
            return train, val
        mixed = self._mixed_rows(rows)
        if mixed is None:
            return train, val
        from datasets import Dataset

        return Dataset.from_list(mixed), val

    def _no_rows(self) -> str:
        return f"--dataset {' '.join(self.args.dataset)}: no usable row is left after ms-swift's checks"

    def _mixed_rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
        """What the method trains on, the same on every rank: rank 0 decides and writes, all read the file.

        A resumed run reads the file again instead of drawing again. None: the rows are left as they are.
        """
        folder = Path(self.args.output_dir) / DATA_DIR
        manifest_file, data_file = folder / "manifest.json", folder / "train.jsonl"
        self.args.training_args.device  # noqa: B018 -- starts the process group, which the barrier needs
        if distributed.world()[0] == 0:
            key = {
                "method": self._method.name,
                "settings": vars(self._method.config),
                "seed": self.args.seed,
                "rows_sha256": hash_of_rows(rows),
                "previous_weights_sha256": self._previous.weights_sha256 if self._previous else None,
            }
            try:
                mixed = self.session.prepare_rows(rows)
            finally:
                send_home(distributed.gather_json)
            manifest = {"schema": 1, **key, "changed": mixed is not rows, "n_own": len(rows), "n_rows": len(mixed)}
            if manifest["changed"]:
                write_jsonl(data_file, mixed)
                manifest["train_sha256"] = sha256_file(data_file)
            old = read_json(manifest_file) if manifest_file.is_file() else None
            if self.args.resume_from_checkpoint and old is not None and old != manifest:
                raise UserError(
                    f"{manifest_file}: the training rows differ from those of the checkpoint that is resumed "
                    "(data file, settings or previous stage changed); start the stage anew with --cl_resume false"
                )
            write_json(manifest_file, manifest)
        else:
            self.session.rows = rows
            help_out(self._open_here, distributed.gather_json, distributed.world()[0])
        distributed.barrier()
        return read_jsonl(data_file) if read_json(manifest_file)["changed"] else None

    # --- model -------------------------------------------------------------------------------------------------------

    def prepare_model(self, args: Any, model: Any, **kwargs: Any) -> Any:
        if self._classifies:
            # A model that was loaded has drawn the start of its head, one that is shared has not: the adapter begins
            # with the same numbers either way.
            set_seed(args.seed)
        model = super().prepare_model(args, model, **kwargs)
        if self._tuner is not None:
            self._tuner.configure(settings_of(args, self._tuner), model)
        if self._previous is not None and not args.resume_from_checkpoint and not self._method.starts_fresh:
            self._assert_started_from_previous(model)
        model = self.session.prepare_model(model)
        distributed.agree_on_start(model, args.training_args.device)
        return model

    def _assert_started_from_previous(self, model: Any) -> None:
        """What was loaded, adapter or full model, is the previous stage's, tensor for tensor."""
        from safetensors import safe_open

        assert self._previous is not None
        if self.args.tuner_type == "full" and not distributed.holds_weights():
            return
        folder = self._previous.weights_dir
        named = self._tuner.live_tensors(model) if self._tuner else _named_as_saved(model)
        live = {parameter_name(name): tensor for name, tensor in named.items()}
        compared = 0
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 -- not a mapping
                    loaded = live.get(parameter_name(name))
                    if loaded is None:
                        raise RunFailure(f"{file}: tensor {name} was not loaded: the chain is broken")
                    if distributed.is_partitioned(loaded):
                        continue
                    expected = tensors.get_tensor(name)
                    loaded = loaded.detach().to("cpu", expected.dtype)
                    if sha256_tensors({name: loaded}) != sha256_tensors({name: expected}):
                        raise RunFailure(f"{file}: tensor {name} was loaded with other values: the chain is broken")
                    compared += 1
        logger.info(f"started from {folder}: {compared} tensors, equal by hash")

    # --- training and the stage's end --------------------------------------------------------------------------------

    def run(self) -> Any:
        with _our_trainers(), own_checkpointing():
            return super().run()

    def _get_trainer_kwargs(self) -> dict[str, Any]:
        return {**super()._get_trainer_kwargs(), "cl_session": self.session}

    def train(self, trainer: Any) -> Any:
        result = super().train(trainer)
        self.trainer = trainer
        self._finish(trainer)
        return result

    def _finish(self, trainer: Any) -> None:
        """Write adapter/, cl_state/ and, last, stage.json."""
        if self.args.streaming and trainer.state.global_step == 0:
            raise UserError(self._no_rows())
        output_dir = Path(self.args.output_dir)
        self._method.train_end(self.session)
        weights = self._save_weights(trainer, output_dir)
        probe = self._probe(trainer, output_dir / weights)
        self.session.end_task(self.args.model)
        if distributed.world()[0] == 0:
            file = output_dir / weights / WEIGHTS
            base = Path(self.args.model)
            started_from = None
            if self._previous is not None:
                started_from = {
                    "dir": os.path.relpath(self._previous.dir, output_dir),
                    "weights_sha256": self._previous.weights_sha256,
                }
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            Stage(
                dir=output_dir,
                task=self.args.cl_task,
                index=len(self.session.earlier),
                method=self._method.name,
                weights=weights,
                weights_sha256=sha256_file(file) if file.is_file() else None,
                tuner_type=self.args.tuner_type,
                base_model=self._base_model(base),
                model_args={
                    "model_type": self.args.model_type,
                    "template": self.args.template,
                    "torch_dtype": str(self.args.torch_dtype).removeprefix("torch."),
                    **({"task_type": "seq_cls", "num_labels": str(self.args.num_labels)} if self._classifies else {}),
                },
                system=self.args.system,
                seed=self.args.seed,
                started_from=started_from,
                train={
                    "steps": trainer.state.global_step,
                    "epochs": trainer.state.num_train_epochs,
                    "rows": None if self.args.streaming else len(self.session.rows),
                    "last_loss": losses[-1] if losses else None,
                    "seconds": round(time.time() - self._started, 1),
                    "processes": distributed.world()[1],
                    "rows_a_step": self.session.global_batch,
                },
                probe=probe,
                route=self.session.route_record() if self._training.last else None,
            ).save()
        distributed.barrier()
        drop_phases(self._training, self._method)

    def _probe(self, trainer: Any, weights: Path) -> dict[str, Any] | None:
        """What the kept weights answer; None where others are kept than are in memory and one process does not hold
        them all."""
        if self._classifies:
            return None  # what is recorded are tokens
        kept: Any = nullcontext()
        if overrides(self._method, "export"):
            parameters = self.session.parameters.values()
            if distributed.world()[1] > 1 or any(distributed.is_partitioned(p) for p in parameters):
                return None
            kept = kept_adapter(trainer.model, weights)
        messages = probe_messages(self.session.rows, self.args.system)
        with kept, trainer.compute_loss_context_manager():
            return record_probe(trainer.model, self.template, messages, trainer.accelerator.device)

    @property
    def _classifies(self) -> bool:
        """Whether the model has a classifier head."""
        return bool(self.args.task_type == "seq_cls")

    def _base_model(self, path: Path) -> str:
        if self.args.tuner_type == "full" and self._previous is not None:
            return self._previous.base_model
        return str(path.resolve()) if path.is_dir() else self.args.model

    def _save_weights(self, trainer: Any, output_dir: Path) -> str:
        """Write the exported weights; returns their folder relative to the stage's."""
        from peft import PeftModel

        state = self.session.exported_state(trainer)
        folder = ADAPTER_DIR if isinstance(trainer.model, PeftModel) else "model"
        if distributed.world()[0] == 0:
            temporary, final = output_dir / f".{folder}.tmp", output_dir / folder
            shutil.rmtree(temporary, ignore_errors=True)
            trainer._save_model(str(temporary), state)
            if folder == "model":
                self.processor.save_pretrained(temporary) if hasattr(self.processor, "save_pretrained") else None
            else:
                config = temporary / "adapter_config.json"
                write_json(config, self._method.export_config(self.session, read_json(config)))
            for name, value in self._method.export_files(self.session).items():
                write_json(temporary / name, value)
            shutil.copy(output_dir / "args.json", temporary / "args.json")
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        distributed.barrier()
        return folder

    def release(self) -> tuple[Any, Any] | None:
        """The base model without adapter and the processor, for the next stage; None where it must be loaded anew."""
        from peft import PeftModel

        model = self.trainer.model
        if not isinstance(model, PeftModel) or self.args.deepspeed or self.args.fsdp:
            return None
        base = self._tuner.base_of(model) if self._tuner else model.unload()
        base.gradient_checkpointing_disable()  # the next stage's own setting counts, and some tuners have to be without
        return base, self.processor


def _named_as_saved(model: Any) -> dict[str, Any]:
    """Live tensors by the names that they have in a file (PEFT shortens some, those of DoRA for one)."""
    from peft import PeftModel, get_peft_model_state_dict

    live: dict[str, Any] = model.state_dict(keep_vars=True)
    if isinstance(model, PeftModel):
        live = get_peft_model_state_dict(model, state_dict=live, save_embedding_layers=False)
    return live


def _fits(model: Any, args: Any) -> bool:
    """Whether a model that an earlier stage left over is of the kind that this stage trains."""
    info = model.model_info
    same_task = bool(info.task_type == args.task_type)
    return same_task and (args.task_type != "seq_cls" or info.num_labels == args.num_labels)


def print_all_flags() -> None:
    """Every flag, ms-swift's and ours, as argparse lists them."""
    HfArgumentParser([arguments_class()], prog="swift-cl sft").print_help()


def main(argv: list[str]) -> None:
    """`swift-cl sft` inside the training process."""
    if flag_values(argv).get("cl_method"):
        CLSft(argv).main()
        return
    args, _ = parse_stage_arguments(argv)
    SwiftSft(args).main()
