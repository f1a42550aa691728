"""Where the weights of a build come from: a Hugging Face checkpoint, a quantized one, an FT folder, or nowhere.

One object is opened for a build. It describes the model of a rank with its loaders set, quantized or not.
"""

from dataclasses import dataclass
from pathlib import Path

from build_args import BuildArgs
from dummy_weights import load_dummy_weights
from quant_scheme import QuantScheme, check_flags, scheme_of
from weight import load_from_hf_qwen

from tensorrt_llm import Builder, Engine, Mapping, net_guard
from tensorrt_llm.models import QWenConfig, QWenForCausalLM
from tensorrt_llm.runtime.session import pick_device


@dataclass(frozen=True)
class WeightSource:
    """Config, scheme and weights of one build."""

    args: BuildArgs
    config: QWenConfig
    scheme: QuantScheme

    @classmethod
    def open(cls, args: BuildArgs) -> "WeightSource":
        """Read configs and headers, and refuse flags that don't go together or with what the folders hold."""
        check_flags(args)
        pick_device(args.device)
        config = QWenConfig.from_hf_dir(args.hf_model_dir)
        return cls(args, config, scheme_of(args))

    def engine(self, rank: int) -> Engine:
        """The engine of one rank, its weights still in their files."""
        return self._compile(self.quantized_model(self.args.mapping(rank)), self.scheme.algo)

    def whole_engine(self) -> Engine:
        """The quantized engine that one rank alone would run: equal to all ranks together."""
        return self._compile(self.quantized_model(Mapping()), self.scheme.algo)

    def unquantized_engine(self) -> tuple[Engine, str]:
        """The engine that the verdict compares with, and what its weights are."""
        model = QWenForCausalLM(self.config, self.args.dtype)
        load_from_hf_qwen(model, self.args.hf_model_dir, self.config)
        return self._compile(model, ""), f"the unquantized weights of {self.args.hf_model_dir.name}"

    @property
    def calibration_ids(self) -> Path | None:
        """The text that the weights were calibrated on, if it came with them."""
        return None

    def quantized_model(self, mapping: Mapping) -> QWenForCausalLM:
        model = QWenForCausalLM(self.config, self.args.dtype, mapping)
        self.scheme.apply(model)
        if self.args.dummy_weights:
            load_dummy_weights(model, pick_device(self.args.device))
        else:
            load_from_hf_qwen(model, self.args.hf_model_dir, self.config, mapping)
        return model

    def _compile(self, model: QWenForCausalLM, quant_algo: str) -> Engine:
        builder = Builder()
        network = builder.create_network()
        network.set_named_parameters(model.named_parameters())
        with net_guard(network):
            model(**model.prepare_inputs(self.args.tokens_per_block))
        return builder.build_engine(network, builder.create_builder_config(model, self.args.limits(), quant_algo))
