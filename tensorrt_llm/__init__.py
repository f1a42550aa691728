"""Describe a model as a network, compile it into a portable engine, run it: TensorRT-LLM 0.7.1's workflow anew.

What stands here is imported when it is asked for. So what needs no torch comes without it, which takes seconds, and a
process that runs an engine loads nothing that describes models.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import functional, layers, models, runtime
    from .builder import Builder
    from .engine import Engine, EngineConfig
    from .limits import Limits
    from .mapping import Mapping
    from .module import Module, ModuleList
    from .network import Network, Tensor, default_net, net_guard
    from .parameter import Parameter
else:
    # Names that have a module of another name.
    _MODULES = {
        "Builder": "builder",
        "Engine": "engine",
        "EngineConfig": "engine",
        "Limits": "limits",
        "Mapping": "mapping",
        "Module": "module",
        "ModuleList": "module",
        "Network": "network",
        "Parameter": "parameter",
        "Tensor": "network",
        "default_net": "network",
        "net_guard": "network",
    }

    def __getattr__(name: str) -> object:
        module = f"{__name__}.{_MODULES.get(name, name)}"
        if find_spec(module) is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(module), name) if name in _MODULES else import_module(module)


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
