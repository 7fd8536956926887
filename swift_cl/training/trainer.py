"""The trainer: ms-swift's own, with the method's hooks at the places where each engine allows them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swift.trainers import Seq2SeqTrainer, Trainer
from transformers import TrainerCallback

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
        batches, num_items = super().get_batch_samples(epoch_iterator, *args, **kwargs)  # type: ignore[misc]
        if self._cl_window:
            self.cl_session.window(batches)
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        if not (self._cl_loss and self.model.training):  # type: ignore[attr-defined]
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
            )
        kept = {key: value for key, value in inputs.items() if key not in _NOT_MODEL_INPUTS}
        loss, outputs = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **kwargs
        )
        loss = self.cl_session.loss(kept, loss, outputs, num_items_in_batch)
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
