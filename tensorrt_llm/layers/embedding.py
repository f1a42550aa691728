"""Token embedding, the same on every rank."""

from ..functional import embedding
from ..module import Module
from ..network import Tensor
from ..parameter import Parameter


class Embedding(Module):
    """Rows of a table [num_embeddings, embedding_dim]."""

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: str = "float16") -> None:
        super().__init__()
        self.weight = Parameter((num_embeddings, embedding_dim), dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        return embedding(input_ids, self.weight.value)
