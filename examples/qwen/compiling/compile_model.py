"""From a described model to its engine in memory: build.py compiles what will run, calibration what it looks at."""

from tensorrt_llm import Builder, Engine, Limits, net_guard
from tensorrt_llm.models import QWenForCausalLM


def compile_model(
    model: QWenForCausalLM,
    limits: Limits,
    quant_algo: str = "",
    *,
    batch_invariant: bool = False,
    fuse: bool = True,
) -> Engine:
    """The engine of a model whose loaders are set; weights stay in their files until they are used."""
    builder = Builder()
    network = builder.create_network()
    network.set_named_parameters(model.named_parameters())
    with net_guard(network):
        model(**model.prepare_inputs(limits.tokens_per_block))
    config = builder.create_builder_config(model, limits, quant_algo, batch_invariant=batch_invariant)
    return builder.build_engine(network, config, fuse=fuse)
