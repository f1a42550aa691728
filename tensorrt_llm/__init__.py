"""Describe a model as a network, compile it into a portable engine, run it: TensorRT-LLM 0.7.1's workflow anew."""

from . import functional, layers, models, runtime
from .builder import Builder
from .engine import Engine, EngineConfig
from .limits import Limits
from .mapping import Mapping
from .module import Module, ModuleList
from .network import Network, Tensor, default_net, net_guard
from .parameter import Parameter

__all__ = [
    "Builder",
    "Engine",
    "EngineConfig",
    "Limits",
    "Mapping",
    "Module",
    "ModuleList",
    "Network",
    "Parameter",
    "Tensor",
    "default_net",
    "functional",
    "layers",
    "models",
    "net_guard",
    "runtime",
]
