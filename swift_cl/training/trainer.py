"""The trainer: ms-swift's own, with the method's hooks at the places where each engine allows them."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from swift.trainers import Seq2SeqTrainer, Trainer
from transformers import TrainerCallback

from swift_cl.training.batches import OrderedBatchSampler
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
        self._cl_loss = overrides(method, "loss") or method.needs_logits
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
        session: Session = self.cl_session
        dataset = self.train_dataset  # type: ignore[attr-defined]
        if not overrides(session.method, "batch_order") or not hasattr(dataset, "__len__"):
            return super().get_train_dataloader(skip_batches=skip_batches)  # type: ignore[misc]
        if session.batch_order(len(dataset), 0) is None:
            return super().get_train_dataloader(skip_batches=skip_batches)  # type: ignore[misc]
        return self._ordered_dataloader(dataset, skip_batches)

    def _ordered_dataloader(self, dataset: Any, skip_batches: int) -> Any:
        from accelerate.data_loader import SkipBatchSampler
        from swift.dataloader import DataLoaderShard
        from swift.utils import seed_worker

        session, args = self.cl_session, self.args  # type: ignore[attr-defined]
        sampler: Any = OrderedBatchSampler(
            lambda epoch: session.batch_order(len(dataset), epoch) or (),
            len(dataset),
            self._train_batch_size,  # type: ignore[attr-defined]
            session.rank,
            session.world_size,
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
        if self._cl_gradients:
            self.cl_session.after_backward()
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
        self.cl_session.save_checkpoint_state(folder)
        return super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]


class CLSeq2SeqTrainer(CLTrainerMixin, Seq2SeqTrainer):
    """For `--task_type causal_lm`."""


class CLTrainer(CLTrainerMixin, Trainer):
    """For `--task_type seq_cls`."""


TRAINERS = {
    "causal_lm": f"{__name__}.CLSeq2SeqTrainer",
    "seq_cls": f"{__name__}.CLTrainer",
}
