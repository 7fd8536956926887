"""The trainer: ms-swift's own, with the method's hooks at the places where each engine allows them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from swift.trainers import Seq2SeqTrainer, Trainer
from transformers import TrainerCallback

from swift_cl.training import portable
from swift_cl.training.batches import OrderedBatchSampler, shuffled
from swift_cl.training.session import Session, overrides

# What ms-swift puts beside the model's inputs and takes out again in its own compute_loss.
_NOT_MODEL_INPUTS = ("compute_loss_func", "loss_scale", "text_position_ids", "channel", "num_items_in_batch")


class SessionCallback(TrainerCallback):
    """Tells the session when training begins and when an optimizer step has ended."""

    def __init__(self, trainer: Any, session: Session) -> None:
        self._trainer, self._session = trainer, session

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._session.attach(self._trainer)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._session.step_ended()


class CLTrainerMixin:
    """Adds the hooks to any ms-swift trainer; hooks that the method leaves alone are not entered."""

    def __init__(self, *args: Any, cl_session: Session, **kwargs: Any) -> None:
        self.cl_session = cl_session
        super().__init__(*args, **kwargs)
        self.add_callback(SessionCallback(self, cl_session))  # type: ignore[attr-defined]
        method = cl_session.method
        self._cl_loss = overrides(method, "loss") or overrides(method, "forward") or method.needs_logits
        self._cl_window = overrides(method, "window")
        self._cl_gradients = overrides(method, "gradients")

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:  # type: ignore[attr-defined]
            # Resumed from the checkpoint of the last step: the Trainer's loop would take one more before it looks.
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, *args, **kwargs)  # type: ignore[misc]
        if self._cl_window:
            self.cl_session.window(batches)
        return batches, num_items

    def get_train_dataloader(self, skip_batches: int = 0) -> Any:
        order = self._cl_order()
        if order is None:
            return super().get_train_dataloader(skip_batches=skip_batches)  # type: ignore[misc]
        return self._ordered_dataloader(order, skip_batches)

    def _cl_order(self) -> Callable[[int], Sequence[int]] | None:
        """The order of the rows in an epoch, where it is not ms-swift's own sampler that decides."""
        session, dataset = self.cl_session, self.train_dataset  # type: ignore[attr-defined]
        if not hasattr(dataset, "__len__"):
            return None
        if self._cl_batch_order():
            return lambda epoch: session.batch_order(len(dataset), epoch) or ()
        resumed, args = session.resumed, self.args  # type: ignore[attr-defined]
        if resumed is None or resumed.before.rows in (None, self._cl_rows(without_resumed=True)):
            return None
        # Another number of processes would leave out other rows, and shuffle the rest differently.
        permuted = resumed.before.rows[0]
        if not args.train_dataloader_shuffle:
            return lambda epoch: range(permuted)
        return lambda epoch: shuffled(permuted, args.data_seed or 0, epoch)

    def _cl_batch_order(self) -> bool:
        """Whether the method decides on the order of the rows."""
        session, dataset = self.cl_session, self.train_dataset  # type: ignore[attr-defined]
        return overrides(session.method, "batch_order") and session.batch_order(len(dataset), 0) is not None

    def _cl_rows(self, without_resumed: bool = False) -> tuple[int, int] | None:
        """Rows of an epoch: (in its permutation, of these used); None where the data is streamed."""
        session, dataset = self.cl_session, self.train_dataset  # type: ignore[attr-defined]
        if not hasattr(dataset, "__len__"):
            return None
        if session.resumed is not None and session.resumed.before.rows is not None and not without_resumed:
            return session.resumed.before.rows
        permuted = len(dataset) - len(dataset) % session.world_size
        dropped = self.args.dataloader_drop_last and not self._cl_batch_order()  # type: ignore[attr-defined]
        micro_batches = session.micro_batch * session.world_size
        return permuted, permuted - permuted % micro_batches if dropped else permuted

    def _ordered_dataloader(self, order: Callable[[int], Sequence[int]], skip_batches: int) -> Any:
        from accelerate.data_loader import SkipBatchSampler
        from swift.dataloader import DataLoaderShard
        from swift.utils import seed_worker

        session, args, dataset = self.cl_session, self.args, self.train_dataset  # type: ignore[attr-defined]
        rows = session.resumed.before.rows if session.resumed is not None else None
        sampler: Any = OrderedBatchSampler(
            order,
            len(dataset),
            self._train_batch_size,  # type: ignore[attr-defined]
            session.rank,
            session.world_size,
            rows[1] if rows else None,
            args.gradient_accumulation_steps,
        )
        if skip_batches > 0:
            sampler = SkipBatchSampler(sampler, skip_batches=skip_batches)
        return DataLoaderShard(
            dataset,
            device=self.accelerator.device,  # type: ignore[attr-defined]
            batch_sampler=sampler,
            collate_fn=self.data_collator,  # type: ignore[attr-defined]
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        if not (self._cl_loss and self.model.training):  # type: ignore[attr-defined]
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
            )
        kept = {key: value for key, value in inputs.items() if key not in _NOT_MODEL_INPUTS}
        channels, token_weights = inputs.get("channel"), inputs.get("loss_scale")
        with self.cl_session.forward(kept, channels):
            loss, outputs = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **kwargs
            )
        loss = self.cl_session.loss(kept, loss, outputs, num_items_in_batch, channels, token_weights)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self._cl_gradients or self.cl_session.watchers:
            self.cl_session.after_backward()
        return loss

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self._cl_frozen = self.cl_session.frozen_adapter()
        super().save_model(*args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is not None:
            state_dict = {**self._cl_frozen, **state_dict}
        super()._save(output_dir, state_dict)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
        self.cl_session.save_checkpoint_state(folder)
        if not self.args.save_only_model:  # type: ignore[attr-defined]
            layout = replace(
                self.cl_session.layout,
                rows=self._cl_rows(),
                step=self.state.global_step,  # type: ignore[attr-defined]
                schedule=portable.schedule_steps(self.lr_scheduler),  # type: ignore[attr-defined]
            )
            parameters = self.cl_session.parameters if self.cl_session.portable else None
            portable.save(folder / portable.FOLDER, layout, self, parameters)
        return super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # transformers refuses FSDP2's files under another engine; `Session.attach` restores what they hold.
        if self.cl_session.resumed is None or not self.cl_session.resumed.tensors:
            super()._load_from_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        # The optimizer's files in the checkpoint are another engine's; `Session.attach` restores what they hold.
        resumed = self.cl_session.resumed
        if resumed is not None and resumed.tensors:
            resume_from_checkpoint = None
        return super()._prepare_for_training(  # type: ignore[misc]
            max_steps, train_dataloader, resume_from_checkpoint
        )


class CLSeq2SeqTrainer(CLTrainerMixin, Seq2SeqTrainer):
    """For `--task_type causal_lm`."""


class CLTrainer(CLTrainerMixin, Trainer):
    """For `--task_type seq_cls`."""


TRAINERS = {
    "causal_lm": f"{__name__}.CLSeq2SeqTrainer",
    "seq_cls": f"{__name__}.CLTrainer",
}
