"""Times llama.cpp on random weights of a given shape, for compare_llama_cpp.py.

Writes a GGUF file per mode into a folder, unless it is there, and loads them all. Then each line on stdin, "MODE PROMPT
NEW", is answered by one line of JSON: seconds of the prompt, and of each new token, greedy, sampling included. Any
Python with llama-cpp-python, gguf and numpy runs it: it needs nothing of this project.
"""

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType as Type

# What a mode stores: matrices of the layers, and the embedding, which is lm_head too. "q4_0" follows llama-quantize,
# which gives the output Q8_0 where rows are no multiple of 256 (and Q6_K where they are).
MODES = {"f16": (Type.F16, Type.F16), "q8_0": (Type.Q8_0, Type.Q8_0), "q4_0": (Type.Q4_0, Type.Q8_0)}
_STANDARD_DEVIATION = 0.02
# Of integers drawn evenly from all that a block may hold.
_INTEGER_DEVIATION = {Type.Q8_0: 73.9, Type.Q4_0: 4.6}


def random_matrix(rows: int, columns: int, kind: Type, random: np.random.Generator) -> np.ndarray:
    """The bytes [rows, bytes of a row] of a matrix; a block of 32 quantized numbers begins with its float16 scale."""
    if kind is Type.F16:
        values = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(_STANDARD_DEVIATION)
        return values.astype(np.float16).view(np.uint8)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (rows, columns // block_size, block_bytes), dtype=np.uint8)
    scale = np.float16(_STANDARD_DEVIATION / _INTEGER_DEVIATION[kind])
    blocks[:, :, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    return blocks.reshape(rows, -1)


def write_model(path: Path, shape: dict[str, Any], mode: str) -> None:
    """A Qwen2 model as GGUF; `shape` has the keys of a Hugging Face config.json."""
    layer_type, head_type = MODES[mode]
    random = np.random.default_rng(0)
    hidden, inner, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    kv_rows = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("none")

    def add_matrix(name: str, rows: int, columns: int, kind: Type) -> None:
        writer.add_tensor(f"{name}.weight", random_matrix(rows, columns, kind, random), raw_dtype=kind)

    def add_vector(name: str, values: np.ndarray) -> None:
        writer.add_tensor(name, values.astype(np.float32))

    add_matrix("token_embd", vocabulary, hidden, head_type)
    add_vector("output_norm.weight", np.ones(hidden))
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"blk.{layer}."
        add_vector(prefix + "attn_norm.weight", np.ones(hidden))
        add_vector(prefix + "ffn_norm.weight", np.ones(hidden))
        for name, rows in (("attn_q", hidden), ("attn_k", kv_rows), ("attn_v", kv_rows)):
            add_matrix(prefix + name, rows, hidden, layer_type)
            add_vector(f"{prefix}{name}.bias", random.standard_normal(rows) * _STANDARD_DEVIATION)
        add_matrix(prefix + "attn_output", hidden, hidden, layer_type)
        add_matrix(prefix + "ffn_gate", inner, hidden, layer_type)
        add_matrix(prefix + "ffn_up", inner, hidden, layer_type)
        add_matrix(prefix + "ffn_down", hidden, inner, layer_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model:
    """One sequence at a time, greedy."""

    def __init__(self, path: Path, threads: int, context: int, vocabulary: int) -> None:
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocabulary = vocabulary

    def time_tokens(self, prompt: list[int], new: int) -> list[float]:
        """Seconds to the first token, then to each next one."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        tokens, seconds = prompt, []
        for _ in range(new):
            started = time.perf_counter()
            array = (llama_cpp.llama_token * len(tokens))(*tokens)
            if llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(tokens))):
                raise RuntimeError("llama_decode failed")
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), (self._vocabulary,))
            tokens = [int(logits.argmax())]
            seconds.append(time.perf_counter() - started)
        return seconds


# llama.cpp keeps the address.
@llama_cpp.llama_log_callback
def _log_errors(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    if level >= 4:
        sys.stderr.write(text.decode(errors="replace"))


def main(folder: Path, threads: int, context: int, modes: list[str]) -> None:
    llama_cpp.llama_log_set(_log_errors, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    shape = json.loads((folder / "config.json").read_text())
    models = {}
    for mode in modes:
        path = folder / f"{mode}.gguf"
        if not path.exists():
            unfinished = path.with_suffix(".part")
            write_model(unfinished, shape, mode)
            unfinished.rename(path)
        models[mode] = Model(path, threads, context, shape["vocab_size"])
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        mode, prompt, new = line.split()
        seconds = models[mode].time_tokens(list(range(1, int(prompt) + 1)), int(new))
        print(json.dumps({"first": seconds[0], "next": seconds[1:]}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
