"""Which quantization the flags of build.py ask for: one scheme, or an error that says which flags contradict.

No flag is ignored: a combination that would build something else than it says is refused. Knows no file and no weight.
"""

from dataclasses import dataclass
from typing import Any

from checkpoint.quantized_checkpoint import QuantizedCheckpoint

from tensorrt_llm.models import quantize_model
from tensorrt_llm.quantization import QuantMode
from tensorrt_llm.quantization.layers import WeightOnlyLayout

from .args import FROM_CHECKPOINT, TENSORRT, BuildArgs


@dataclass(frozen=True)
class QuantScheme:
    """What is done to the network, and the name under which the engine says so."""

    mode: QuantMode
    algo: str  # EngineConfig.quant_algo
    layout: WeightOnlyLayout | None = None  # of weight-only layers
    quantizes_lm_head: bool = False  # to INT8 per channel
    lm_head_has_layout: bool = False  # the checkpoint's output layer is stored like its other layers

    @property
    def is_quantized(self) -> bool:
        return bool(self.mode) or self.quantizes_lm_head

    def apply(self, model: Any) -> Any:
        """Replace the layers of `model`."""
        layout = self.layout or WeightOnlyLayout(bits=8)
        return quantize_model(
            model,
            self.mode,
            group_size=layout.group_size,
            zero=layout.zero,
            pre_quant_scale=layout.pre_quant_scale,
            act_order=layout.act_order,
            positive_scales=layout.positive_scales,
            exclude_modules=() if self.lm_head_has_layout else ("lm_head",),
            quantize_lm_head=self.quantizes_lm_head,
        )


def reads_quantized_checkpoint(flags: BuildArgs) -> bool:
    """Whether the weights come quantized, from a GPTQ or AWQ folder."""
    return flags.weight_only_precision in FROM_CHECKPOINT


def check_flags(flags: BuildArgs) -> None:
    """Refuse flags that contradict each other or would have no effect."""
    precision = flags.weight_only_precision
    needs = (
        ("--weight_only_precision", precision is not None, "--use_weight_only", flags.use_weight_only),
        ("--per_group", flags.per_group, "--use_weight_only", flags.use_weight_only),
        ("--group_size", flags.group_size is not None, "--per_group", flags.per_group),
        ("--per_token", flags.per_token, "--use_smooth_quant", flags.use_smooth_quant),
        ("--per_channel", flags.per_channel, "--use_smooth_quant", flags.use_smooth_quant),
        (
            "--quant_ckpt_path",
            flags.quant_ckpt_path is not None,
            f"--weight_only_precision {', '.join(FROM_CHECKPOINT)}",
            reads_quantized_checkpoint(flags),
        ),
    )
    for flag, is_given, other, has_other in needs:
        if is_given and not has_other:
            raise ValueError(f"{flag} is given without {other}: it would have no effect, expected both or neither")
    excluding = (
        ("--use_smooth_quant", flags.use_smooth_quant, "--use_weight_only", flags.use_weight_only),
        (
            f"--weight_only_precision {precision}",
            reads_quantized_checkpoint(flags),
            "--ft_dir_path",
            flags.ft_dir_path is not None,
        ),
        (
            "--weight_only_precision int8",
            flags.use_weight_only and precision in (None, "int8"),
            "--per_group",
            flags.per_group,
        ),
        ("--dummy_weights", flags.dummy_weights, "--ft_dir_path", flags.ft_dir_path is not None),
        ("--dummy_weights", flags.dummy_weights, "--quant_ckpt_path", flags.quant_ckpt_path is not None),
    )
    for flag, is_given, other, has_other in excluding:
        if is_given and has_other:
            raise ValueError(f"{flag} and {other} exclude each other, expected one of them")
    if flags.use_smooth_quant and flags.ft_dir_path is None and not flags.dummy_weights:
        raise ValueError(
            "--use_smooth_quant is given without --ft_dir_path, expected the folder that hf_qwen_convert.py "
            "--smoothquant wrote: scales of activations are calibrated, not guessed"
        )
    if flags.group_size is not None and flags.group_size < 1:
        raise ValueError(f"--group_size is {flags.group_size}, expected at least 1")


def scheme_of(flags: BuildArgs, checkpoint: QuantizedCheckpoint | None = None) -> QuantScheme:
    """The scheme of checked flags; what an opened quantized `checkpoint` says of itself counts for its layers."""
    if checkpoint is not None:
        layout, algo = _checkpoint_layout(flags, checkpoint), checkpoint.quant_algo
        mode = _weight_only(layout)
    elif flags.use_smooth_quant:
        layout, mode = None, QuantMode.use_smooth_quant(flags.per_token, flags.per_channel)
        algo = "W8A8_SQ_" + "_".join(
            f"PER_{'CHANNEL' if is_fine else 'TENSOR'}" if index == 0 else f"PER_{'TOKEN' if is_fine else 'TENSOR'}"
            for index, is_fine in enumerate((flags.per_channel, flags.per_token))
        )
    elif flags.use_weight_only:
        bits = 8 if flags.weight_only_precision in (None, "int8") else 4
        group_size = (flags.group_size or 128) if flags.per_group else 0
        layout = _dummy_layout(flags) or WeightOnlyLayout(bits, group_size, positive_scales=flags.backend == TENSORRT)
        mode, algo = _weight_only(layout), f"W{bits}A16"
    else:
        layout, mode, algo = None, QuantMode(0), "W8A16_LM_HEAD" if flags.quantize_lm_head else ""
    if flags.int8_kv_cache:
        mode = mode.set_int8_kv_cache()
    lm_head_has_layout = checkpoint is not None and checkpoint.quantizes_lm_head
    if lm_head_has_layout and flags.quantize_lm_head:
        raise ValueError("--quantize_lm_head is given, but the checkpoint's output layer is quantized already")
    return QuantScheme(mode, algo, layout, flags.quantize_lm_head, lm_head_has_layout)


def _weight_only(layout: WeightOnlyLayout) -> QuantMode:
    return QuantMode.use_weight_only(layout.bits == 4, per_group=layout.group_size > 0)


def _dummy_layout(flags: BuildArgs) -> WeightOnlyLayout | None:
    """What published GPTQ and AWQ checkpoints hold, for random weights of that form."""
    group_size = flags.group_size or 128
    return {
        "int4_gptq": WeightOnlyLayout(4, group_size),
        "int8_gptq": WeightOnlyLayout(8, group_size),
        "int4_awq": WeightOnlyLayout(4, group_size, zero=True),
    }.get(flags.weight_only_precision or "")


def _checkpoint_layout(flags: BuildArgs, checkpoint: QuantizedCheckpoint) -> WeightOnlyLayout:
    layout = checkpoint.layout
    bits, _, method = str(flags.weight_only_precision).partition("_")
    others = {"gptq", "awq"} - {method}
    if bits != f"int{layout.bits}" or any(other.upper() in checkpoint.quant_algo for other in others):
        raise ValueError(
            f"--weight_only_precision is {flags.weight_only_precision}, but the checkpoint is {checkpoint.quant_algo} "
            f"of {layout.bits} bits"
        )
    if flags.per_group and layout.group_size == 0:
        raise ValueError("--per_group is given, but the checkpoint has one scale per output channel; leave it out")
    if flags.group_size is not None and flags.group_size != layout.group_size:
        raise ValueError(f"--group_size is {flags.group_size}, but the checkpoint has groups of {layout.group_size}")
    return layout
