"""vLLM in process, without HTTP, for large grids: the flags, refusals and answers of the backend `vllm`."""

from swift_cl.serving.backends.vllm import CONSTRAINS, ENGINES, arguments, check

__all__ = ["CONSTRAINS", "ENGINES", "IS_OFFLINE", "arguments", "check"]

IS_OFFLINE = True
