"""One linear layer's LoRA matrices as a module, named as the session names them."""

from torch import Tensor, nn


class LoraPair(nn.Module):
    """`layer.lora_A.weight` [rank, in] and `layer.lora_B.weight` [out, rank]."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.layer = nn.Module()
        for name, value in (("lora_A", a), ("lora_B", b)):
            matrix = nn.Linear(value.shape[1], value.shape[0], bias=False)
            matrix.weight = nn.Parameter(value.clone())
            self.layer.add_module(name, matrix)
