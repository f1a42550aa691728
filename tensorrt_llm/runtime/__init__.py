"""Runs engines: requests in, tokens out. Imports neither models nor networks: the engine file is the border."""

from .generation import GenerationSession
from .model_runner import ModelRunner
from .request import Request, SamplingConfig
from .session import Session

__all__ = ["GenerationSession", "ModelRunner", "Request", "SamplingConfig", "Session"]
