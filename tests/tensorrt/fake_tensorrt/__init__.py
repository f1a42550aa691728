"""A stand-in for NVIDIA's module `tensorrt`, of version 11: it records networks and holds every call to the API.

It computes nothing by itself. Code under test is given what `make_tensorrt` returns in place of the module.
"""

from types import SimpleNamespace
from typing import Any

from . import engine, network, tensors
from .strict import CLASSES, ENUMS, ApiError

__all__ = ["ApiError", "make_tensorrt"]


class _Module(SimpleNamespace):
    def __getattr__(self, name: str) -> Any:
        raise ApiError(f"tensorrt has no {name}, as far as manifest.json knows")


def make_tensorrt() -> Any:
    trt = _Module(**CLASSES, **ENUMS)
    trt.__version__ = "11.4.0"
    assert {engine.Builder, network.INetworkDefinition, tensors.ITensor} <= set(CLASSES.values())
    return trt
