"""From a described model to an engine: verify the network, rewrite it, pair its plan with the weights to come.

Knows no kernel and no device: the engine is portable, kernels are chosen where it runs.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from .engine import Engine, EngineConfig
from .limits import Limits
from .models.qwen.model import QWenForCausalLM
from .network import Network
from .parameter import Parameter
from .passes import optimize


class Builder:
    """Makes networks and turns them into engines."""

    def create_network(self) -> Network:
        return Network()

    def create_builder_config(self, model: QWenForCausalLM, limits: Limits) -> EngineConfig:
        """What the engine of `model` says of itself."""
        config, mapping = model.config, model.mapping
        return EngineConfig(
            name="qwen",
            architecture=config.architecture,
            precision=model.dtype,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            inter_size=config.mlp_hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_size=config.head_size,
            hidden_act="silu",
            max_position_embeddings=config.max_position_embeddings,
            seq_length=config.seq_length,
            rotary_base=config.rotary_base,
            use_dynamic_ntk=config.use_dynamic_ntk,
            use_logn_attn=config.use_logn_attn,
            norm_epsilon=config.norm_epsilon,
            quant_mode=0,
            world_size=mapping.world_size,
            rank=mapping.rank,
            tp_size=mapping.tp_size,
            pp_size=mapping.pp_size,
            limits=limits,
        )

    def build_engine(self, network: Network, builder_config: EngineConfig) -> Engine:
        """Optimize the network in place; the engine reads each parameter's data when it is saved or run."""
        network.verify()
        optimize(network)
        parameters = {name: network.named_parameters[name] for name in network.weights}
        return Engine(builder_config, network.to_plan(), _ParameterData(parameters))

    @staticmethod
    def save_config(builder_config: EngineConfig, path: Path) -> None:
        """Write config.json, whole or not at all."""
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(builder_config.to_config_json(), indent=2, sort_keys=True) + "\n")
        partial.replace(path)


class _ParameterData(Mapping[str, torch.Tensor]):
    """The data of parameters by name, loaded anew at each look: nobody holds the model."""

    def __init__(self, parameters: dict[str, Parameter]) -> None:
        self._parameters = parameters

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._parameters[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)
