"""Our tuners as ms-swift sees them: classes in its `tuners_map`."""

from pathlib import Path
from typing import Any

from swift.tuner_plugin import PeftTuner, tuners_map

from swift_cl.tuners.base import Tuner
from swift_cl.tuners.registry import settings_of, tuners


def swift_tuner(tuner: type[Tuner]) -> type[PeftTuner]:
    """A class with the static methods that ms-swift calls."""

    class Bridged(PeftTuner):
        @staticmethod
        def prepare_model(args: Any, model: Any) -> Any:
            config = settings_of(args, tuner)
            model = tuner.prepare_model(args, config, model)
            tuner.configure(config, model)
            return model

        @staticmethod
        def save_pretrained(
            model: Any, save_directory: str, state_dict: Any = None, safe_serialization: bool = True, **kwargs: Any
        ) -> None:
            tuner.save(model, Path(save_directory), state_dict)

        @staticmethod
        def from_pretrained(model: Any, model_id: str, **kwargs: Any) -> Any:
            return tuner.load(model, Path(model_id), bool(kwargs.get("is_trainable")))

    Bridged.__name__ = Bridged.__qualname__ = f"{tuner.__name__}Bridge"
    return Bridged


def register() -> None:
    """Put every tuner of ours into ms-swift's table, in front of a built-in one of the same name."""
    for name, tuner in tuners().items():
        tuner.register()
        tuners_map[name] = swift_tuner(tuner)
