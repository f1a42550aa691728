"""quantize_per_token(norm(x)) -> one op, which quantizes the norm's float32 values before anything rounds them."""

from ..network import Network, Node

# A norm -> the op that also quantizes what it makes.
_FUSED = {"rms_norm": "rms_norm_quantize", "add_rms_norm": "add_rms_norm_quantize"}


def fuse_norm_quantize(network: Network) -> int:
    """The number of norms fused with the quantization that alone reads them."""
    count = 0
    for quantize in [node for node in network.nodes if node.op == "quantize_per_token"]:
        normed = quantize.inputs[0]
        norm = normed.producer
        if norm is None or norm.op not in _FUSED or normed is not norm.outputs[-1]:
            continue
        if network.is_visible(normed) or len(network.users(normed)) != 1:
            continue
        _fuse(network, norm, quantize)
        count += 1
    return count


def _fuse(network: Network, norm: Node, quantize: Node) -> None:
    # Whatever else the norm makes (the residual) comes before its last output, the normed one.
    kept = norm.outputs[:-1]
    made = network.add(
        _FUSED[norm.op],
        *norm.inputs,
        *quantize.inputs[1:],
        outputs=[(tensor.dtype, tensor.shape) for tensor in (*kept, *quantize.outputs)],
        before=norm,
        eps=norm.attrs["eps"],
    )
    for old, new in zip((*kept, *quantize.outputs), made, strict=True):
        network.replace(old, new)
    network.nodes.remove(quantize)
    network.nodes.remove(norm)
