"""Layers of models: modules that hold parameters and call functional ops."""

from .attention import Attention, AttentionParams, KeyValueCacheParams, LayerCache
from .embedding import Embedding
from .linear import ColumnLinear, RowLinear
from .mlp import GatedMLP
from .normalization import RmsNorm

__all__ = [
    "Attention",
    "AttentionParams",
    "ColumnLinear",
    "Embedding",
    "GatedMLP",
    "KeyValueCacheParams",
    "LayerCache",
    "RmsNorm",
    "RowLinear",
]
