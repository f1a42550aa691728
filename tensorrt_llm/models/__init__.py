"""Models: each a short file from token ids to logits."""

from .qwen import QWenConfig, QWenForCausalLM

__all__ = ["QWenConfig", "QWenForCausalLM"]
