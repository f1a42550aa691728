"""The gated MLP of LLaMA and Qwen."""

from ..functional import silu
from ..module import Module
from ..network import Tensor
from .linear import ColumnLinear, RowLinear


class GatedMLP(Module):
    """proj(silu(fc(x)) * gate(x)): `fc` is the branch that is activated, `gate` the linear one (0.7.1's names)."""

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        hidden_act: str = "silu",
        dtype: str = "float16",
        tp_group: tuple[int, ...] = (0,),
        tp_size: int = 1,
    ) -> None:
        super().__init__()
        if hidden_act != "silu":
            raise ValueError(f"GatedMLP: hidden_act is {hidden_act!r}, expected 'silu'")
        self.fc: Module
        self.gate: Module
        self.fc, self.gate = (
            ColumnLinear(hidden_size, ffn_hidden_size, False, dtype, tp_group, tp_size, gather_output=False)
            for _ in range(2)
        )
        self.proj: Module = RowLinear(ffn_hidden_size, hidden_size, dtype, tp_group, tp_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(silu(self.fc(x)) * self.gate(x))
