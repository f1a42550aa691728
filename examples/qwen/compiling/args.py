"""The flags of build.py: each named, explained and given its default once. Knows nothing of how engines are built."""

from dataclasses import dataclass
from pathlib import Path

from command_line import ArgumentError, flag, log_level_flag

from tensorrt_llm import Limits, Mapping
from tensorrt_llm.dtype import PRECISIONS as DTYPES

# Values of --weight_only_precision that take a quantized checkpoint; the others round a float one.
FROM_CHECKPOINT = ("int4_gptq", "int8_gptq", "int4_awq")
_ALWAYS_ON = "accepted: always on"
EMBEDDED, TENSORRT = "embedded", "tensorrt"


@dataclass(frozen=True)
class BuildArgs:
    output_dir: Path = flag(help="folder for the engine files and config.json; made if it is missing")
    hf_model_dir: Path | None = flag(None, help="folder of the Hugging Face checkpoint; only --tune does without")
    tune: bool = flag(
        False,
        help="on a GPU, time the ways to multiply and keep the best in the engine, for GPUs of that name; without "
        "hf_model_dir, of the engine that is in output_dir",
    )
    backend: str = flag(
        EMBEDDED,
        help="what runs the engine: our kernels, on CUDA and the CPU, or NVIDIA's TensorRT 11 on this machine's GPU "
        "(pip install 'tensorrt_llm[tensorrt]'; see docs/tensorrt.md)",
        choices=(EMBEDDED, TENSORRT),
    )
    dtype: str = flag("float16", help="dtype of weights, activations and KV cache", choices=DTYPES)
    max_batch_size: int = flag(8, help="sequences that run at the same time; more wait in a queue")
    max_input_len: int = flag(2048, help="tokens of one prompt")
    max_output_len: int = flag(2048, help="new tokens of one sequence", aliases=("--max_new_tokens",))
    max_num_tokens: int | None = flag(
        None, help="tokens of all sequences in one step (default: the larger of 4096 and max_batch_size)"
    )
    tokens_per_block: int = flag(64, help="tokens per block of the paged KV cache, a power of two")
    world_size: int = flag(1, help="ranks that share the model, one engine file each")
    tp_size: int = flag(1, help="tensor-parallel ranks")
    pp_size: int = flag(1, help="pipeline-parallel ranks; only 1 is supported")
    parallel_build: bool = flag(False, help="build the ranks' engines at the same time, one process each")
    dummy_weights: bool = flag(False, help="random weights; hf_model_dir needs only config.json")
    dry_run: bool = flag(False, help="print what the build and the engine will take, and stop")
    device: str | None = flag(None, help="where dummy weights are made: cpu or cuda (default: cuda when there is one)")
    visualize: bool = flag(False, help="also write the optimized network as text, network_rank<N>.txt")
    use_weight_only: bool = flag(False, help="store the weights of the layers as integers, multiply in dtype")
    weight_only_precision: str | None = flag(
        None,
        help="int8 and int4 round the checkpoint's weights, the others read a quantized checkpoint (default: int8)",
        choices=("int8", "int4", *FROM_CHECKPOINT),
    )
    per_group: bool = flag(False, help="int4 with a scale per group of input channels, not one per output channel")
    group_size: int | None = flag(None, help="input channels per group (default: 128, or what the checkpoint has)")
    quantize_lm_head: bool = flag(False, help="also store the output layer in int8, a scale per output channel")
    quant_ckpt_path: Path | None = flag(
        None, help="GPTQ or AWQ checkpoint: a folder or an ammo .pt (default: hf_model_dir, if that is one)"
    )
    use_smooth_quant: bool = flag(False, help="int8 weights and activations, from the folder of hf_qwen_convert.py")
    per_token: bool = flag(False, help="SmoothQuant: a scale per token, found at run time, not one of calibration")
    per_channel: bool = flag(False, help="SmoothQuant: a scale per output channel of the weights, not one per matrix")
    ft_dir_path: Path | None = flag(None, help="folder that hf_qwen_convert.py wrote; weights are read from there")
    batch_invariant: bool = flag(
        False, help="on CUDA, the same bits for a sequence alone and in any batch; one way to multiply for all steps"
    )
    int8_kv_cache: bool = flag(False, help="int8 keys and values, a scale per token and head, found at run time")
    accuracy_text: Path | None = flag(
        None,
        help="what a quantized engine is judged on: .jsonl[.gz], .txt, or token ids in .npy or .csv (default: the FT "
        "folder's calibration ids, else the bundled calibration text)",
    )
    accuracy_tokens: int = flag(1024, help="tokens of that text to read")
    accuracy_gate: float | None = flag(
        None, help="largest mean KL to the unquantized network in nats per token (default: by mode, see README)"
    )
    allow_accuracy_loss: bool = flag(False, help="build even if the gate is missed; the engine says so")
    log_level: str = log_level_flag("warning")
    max_beam_width: int = flag(1, help="only 1 is supported: there is no beam search yet")
    use_gpt_attention_plugin: str | None = flag(None, help=_ALWAYS_ON, optional_value=True)
    use_gemm_plugin: str | None = flag(None, help=_ALWAYS_ON, optional_value=True)
    remove_input_padding: bool = flag(False, help=_ALWAYS_ON)
    enable_context_fmha: bool = flag(False, help=_ALWAYS_ON)
    enable_context_fmha_fp32_acc: bool = flag(False, help=_ALWAYS_ON)
    paged_kv_cache: bool = flag(False, help=_ALWAYS_ON)
    use_inflight_batching: bool = flag(False, help=_ALWAYS_ON)
    strongly_typed: bool = flag(False, help=_ALWAYS_ON)
    enable_debug_output: bool = flag(False, help=_ALWAYS_ON + ", see run.py --debug_mode")

    @property
    def checkpoint_dir(self) -> Path:
        if self.hf_model_dir is None:
            raise ArgumentError(
                "--hf_model_dir is missing, expected the folder of the Hugging Face checkpoint; only --tune of an "
                "engine that is there does without"
            )
        return self.hf_model_dir

    def limits(self) -> Limits:
        return Limits(
            max_batch_size=self.max_batch_size,
            max_input_len=self.max_input_len,
            max_output_len=self.max_output_len,
            max_num_tokens=max(4096, self.max_batch_size) if self.max_num_tokens is None else self.max_num_tokens,
            tokens_per_block=self.tokens_per_block,
        )

    def mapping(self, rank: int) -> Mapping:
        return Mapping(world_size=self.world_size, rank=rank, tp_size=self.tp_size, pp_size=self.pp_size)
