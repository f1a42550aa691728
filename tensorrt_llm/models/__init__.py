"""Models: each a short file from token ids to logits."""

from .quantize import quantize_model, smooth_quantize
from .qwen import QWenConfig, QWenForCausalLM

__all__ = ["QWenConfig", "QWenForCausalLM", "quantize_model", "smooth_quantize"]
