"""The network that calibration reads text with: floats, unfused, on one rank."""

from pathlib import Path

from compiling.compile_model import compile_model
from weight import load_from_hf_qwen

from tensorrt_llm import Engine, Limits
from tensorrt_llm.models import QWenConfig, QWenForCausalLM


def float_engine(hf_model_dir: Path, config: QWenConfig) -> Engine:
    """float32, every linear layer a node of its own; the weights stay in the checkpoint until they are used."""
    model = QWenForCausalLM(config, "float32")
    load_from_hf_qwen(model, hf_model_dir, config)
    # Calibration reads whole prompts without a session: of the limits only the size of a KV block counts.
    limits = Limits(max_batch_size=1, max_input_len=1, max_output_len=1, max_num_tokens=1, tokens_per_block=64)
    return compile_model(model, limits, fuse=False)
