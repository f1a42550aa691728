"""Qwen-1 and Qwen2, one network."""

from .config import QWenConfig
from .model import QWenForCausalLM

__all__ = ["QWenConfig", "QWenForCausalLM"]
