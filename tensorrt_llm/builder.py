"""From a described model to an engine: verify the network, rewrite it, pair its plan with the weights to come.

Knows no kernel and no device: the engine is portable, kernels are chosen where it runs.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from .engine import Engine, EngineConfig
from .limits import Limits
from .mapping import Mapping as RankMapping
from .network import Network
from .parameter import Parameter
from .passes import optimize
from .quantization.mode import QuantMode


class Model(Protocol):
    """What the builder asks of a model besides its network."""

    dtype: str
    mapping: RankMapping
    quant_mode: QuantMode

    def engine_facts(self) -> dict[str, Any]:
        """The fields of EngineConfig that describe the architecture."""
        ...


class Builder:
    """Makes networks and turns them into engines."""

    def create_network(self) -> Network:
        return Network()

    def create_builder_config(
        self, model: Model, limits: Limits, quant_algo: str = "", *, batch_invariant: bool = False
    ) -> EngineConfig:
        """What the engine of `model` says of itself; `quant_algo` names how its weights were quantized."""
        mapping = model.mapping
        return EngineConfig(
            **model.engine_facts(),
            precision=model.dtype,
            quant_mode=int(model.quant_mode),
            quant_algo=quant_algo,
            batch_invariant=batch_invariant,
            verdict=None,
            world_size=mapping.world_size,
            rank=mapping.rank,
            tp_size=mapping.tp_size,
            pp_size=mapping.pp_size,
            limits=limits,
        )

    def build_engine(self, network: Network, builder_config: EngineConfig, *, fuse: bool = True) -> Engine:
        """Optimize the network in place; the engine reads each parameter's data when it is saved or run.

        Without `fuse` the network stays as described, each matmul a node of its own: what calibration looks at.
        """
        network.verify()
        if fuse:
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
