"""What a stage finds: the names of what is trained, and the stages before it."""

from swift_cl import distributed
from swift_cl.methods.base import EarlierTask
from swift_cl.stages import Stage, load_stage


def parameter_name(name: str) -> str:
    """A name without wrapper prefixes and adapter name, the same under every engine and in every stage."""
    return distributed.plain_name(name).removeprefix("base_model.model.").replace(".default.", ".")


def earlier_tasks(previous: Stage | None) -> list[EarlierTask]:
    """The stages before this one, oldest first, found by following `started_from`."""
    chain: list[EarlierTask] = []
    stage = previous
    while stage is not None:
        chain.insert(0, EarlierTask(stage.task, stage.dir, stage.weights_dir, stage.state_dir))
        stage = load_stage((stage.dir / stage.started_from["dir"]).resolve()) if stage.started_from else None
    return chain


def is_model_input(key: str) -> bool:
    """Whether a batch's entry goes into the model."""
    return key in ("input_ids", "attention_mask", "labels", "position_ids") or key.startswith(("pixel_", "image_"))
