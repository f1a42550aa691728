"""Where the weights of a build come from: a Hugging Face checkpoint, a quantized one, an FT folder, or nowhere.

One object is opened for a build. It describes the model of a rank with its loaders set, quantized or not.
"""

from dataclasses import dataclass
from pathlib import Path

from checkpoint.hf_checkpoint import READABLE_DTYPES, HfCheckpoint
from checkpoint.quantized_checkpoint import QuantizedCheckpoint, open_quantized_checkpoint
from dummy_weights import load_dummy_weights
from ft.folder import FtFolder
from ft.weight import load_from_ft
from weight import load_dequantized, load_from_hf_qwen, load_from_quantized

from tensorrt_llm import Engine, Mapping
from tensorrt_llm.dtype import itemsize
from tensorrt_llm.models import QWenConfig, QWenForCausalLM
from tensorrt_llm.runtime.session import pick_device

from .args import TENSORRT, BuildArgs
from .compile_model import compile_model
from .quant_scheme import QuantScheme, check_flags, reads_quantized_checkpoint, scheme_of


@dataclass(frozen=True)
class WeightSource:
    """Config, scheme and weights of one build."""

    args: BuildArgs
    config: QWenConfig
    scheme: QuantScheme
    checkpoint: QuantizedCheckpoint | None  # GPTQ or AWQ
    ft: FtFolder | None

    @classmethod
    def open(cls, args: BuildArgs) -> "WeightSource":
        """Read configs and headers, and refuse flags that don't go together or with what the folders hold."""
        check_flags(args)
        pick_device(args.device)
        is_quantized = reads_quantized_checkpoint(args)
        config = QWenConfig.from_hf_dir(args.checkpoint_dir, accepts_quantized=is_quantized)
        checkpoint = None
        if is_quantized and not args.dummy_weights:
            checkpoint = open_quantized_checkpoint(args.quant_ckpt_path or args.checkpoint_dir)
        ft = FtFolder.open(args.ft_dir_path, args.tp_size) if args.ft_dir_path else None
        return cls(args, config, scheme_of(args, checkpoint), checkpoint, ft)

    def engine(self, rank: int) -> Engine:
        """The engine of one rank, its weights still in their files; unfused for TensorRT, which fuses by itself."""
        return self._quantized_engine(self.args.mapping(rank), fuse=self.args.backend != TENSORRT)

    def whole_engine(self) -> Engine:
        """The quantized engine that one rank alone would run: equal to all ranks together."""
        return self._quantized_engine(Mapping())

    def unquantized_engine(self) -> tuple[Engine, str]:
        """The engine that the verdict compares with, and what its weights are."""
        args = self.args
        model = QWenForCausalLM(self.config, args.dtype)
        if self.checkpoint is not None and args.quant_ckpt_path in (None, args.checkpoint_dir):
            load_dequantized(model, self.checkpoint, self.config)
            name = "the checkpoint's own dequantized weights (what it lost before is not counted)"
        elif self.ft is not None and self.ft.has_unquantized:
            load_from_ft(model, self.ft, self.config)
            name = f"the unquantized weights of {self.ft.path.name}"
        else:
            load_from_hf_qwen(model, args.checkpoint_dir, self.config)
            name = f"the unquantized weights of {args.checkpoint_dir.name}"
        return compile_model(model, self.args.limits()), name

    @property
    def is_judged(self) -> bool:
        """Whether there is a loss to measure: random weights have none that means anything."""
        return self.scheme.is_quantized and not self.args.dummy_weights

    @property
    def stored_dtype(self) -> str:
        """The widest floating dtype among the tensors that this build reads."""
        if self.args.dummy_weights:
            return self.args.dtype
        if self.ft is not None:
            return self.ft.storage_dtype
        files = self.checkpoint.files if self.checkpoint else HfCheckpoint(self.args.checkpoint_dir)
        found = {info.dtype for info in files.tensors().values()}
        return max(found & set(READABLE_DTYPES), key=itemsize)

    @property
    def calibration_ids(self) -> Path | None:
        """The text that the weights were calibrated on, if it came with them."""
        return self.ft.calibration_ids if self.ft else None

    def _quantized_engine(self, mapping: Mapping, *, fuse: bool = True) -> Engine:
        model = QWenForCausalLM(self.config, self.args.dtype, mapping)
        self.scheme.apply(model)
        if self.args.dummy_weights:
            load_dummy_weights(model, pick_device(self.args.device))
        elif self.checkpoint is not None:
            load_from_quantized(model, self.checkpoint, self.config, mapping)
        elif self.ft is not None:
            load_from_ft(model, self.ft, self.config, mapping)
        else:
            load_from_hf_qwen(model, self.args.checkpoint_dir, self.config, mapping)
        return compile_model(
            model, self.args.limits(), self.scheme.algo, batch_invariant=self.args.batch_invariant, fuse=fuse
        )
