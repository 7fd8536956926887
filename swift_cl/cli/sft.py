"""`swift-cl sft`: `swift sft` with a continual-learning method."""

from swift_cl.errors import RunFailure
from swift_cl.training.flags import check_method_flags, complete_flags, first, flag_values, help_text
from swift_cl.training.preflight import (
    check_data,
    check_model,
    finished_stage,
    is_streaming,
    load_previous,
    start_of_stage,
)
from swift_cl.workflow.launch import launch

SUMMARY = "train one stage: every flag of `swift sft`, plus --cl_method and the flags of that method"


def run(argv: list[str]) -> int:
    """Check what can be checked without torch, then start the training process."""
    if "--help-all" in argv:
        from swift_cl.training.sft import print_all_flags

        print_all_flags()
        return 0
    if not argv or "--help" in argv or "-h" in argv:
        print("usage: swift-cl sft [flags of `swift sft`] --cl_method NAME --cl_task TASK [--cl_previous DIR] ...\n")
        print(help_text())
        return 0
    method = check_method_flags(argv)
    given = flag_values(complete_flags(argv))
    if method is not None:
        for model in given.get("model", []):
            check_model(model)
        check_data(given.get("dataset", []), is_streaming(given))
        previous = load_previous(first(given, "cl_previous"))
        start_of_stage(given, previous, method)
        stage = finished_stage(given, previous)
        if stage is not None:
            print(f"stage {stage.task} is finished already: {stage.dir}")
            return 0
    code = launch("sft", argv)
    if code != 0:
        raise RunFailure(f"the training ended with exit code {code}; its output is above")
    return 0
