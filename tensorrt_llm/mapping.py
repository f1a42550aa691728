"""Where a rank stands in a group of ranks that share one model. Knows numbers only, no communication."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mapping:
    """`world_size` ranks = `tp_size` x `pp_size`; tensor-parallel ranks are side by side, as 0.7.1 numbers them."""

    world_size: int = 1
    rank: int = 0
    gpus_per_node: int = 8
    tp_size: int = 1
    pp_size: int = 1

    def __post_init__(self) -> None:
        for name in ("world_size", "gpus_per_node", "tp_size", "pp_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.tp_size * self.pp_size != self.world_size:
            raise ValueError(
                f"tp_size {self.tp_size} x pp_size {self.pp_size} is {self.tp_size * self.pp_size}, "
                f"expected world_size {self.world_size}"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}, expected 0 to {self.world_size - 1}")

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp_size

    @property
    def tp_group(self) -> tuple[int, ...]:
        """The ranks that split the same layers with this one."""
        first = self.pp_rank * self.tp_size
        return tuple(range(first, first + self.tp_size))
