"""silu(x A^T) * (x B^T) -> one op: one read of x, one rounding, one kernel for the activation."""

from ..network import Network, Node, Tensor

# The op of both matmuls -> the op that makes the product, and how many operands in front of the weights both share.
_FUSED = {
    "matmul": ("gated_mlp", 1),
    "weight_only_quant_matmul": ("weight_only_gated_mlp", 1),
    "smooth_quant_gemm": ("smooth_quant_gated_mlp", 2),
}


def fuse_gated_mlp(network: Network) -> int:
    """The number of gated MLPs fused."""
    count = 0
    for node in [node for node in network.nodes if node.op == "mul"]:
        for activated, linear in (node.inputs, node.inputs[::-1]):
            if _fuse(network, node, activated, linear):
                count += 1
                break
    network.remove_dead_nodes()
    return count


def _fuse(network: Network, product: Node, activated: Tensor, linear: Tensor) -> bool:
    silu, gate = activated.producer, linear.producer
    if silu is None or silu.op != "silu" or gate is None:
        return False
    fc = silu.inputs[0].producer
    if fc is None or not _are_branches(fc, gate):
        return False
    inner = (fc.outputs[0], activated, linear)
    if any(network.is_visible(tensor) or len(network.users(tensor)) != 1 for tensor in inner):
        return False
    op, num_shared = _FUSED[fc.op]
    result = product.outputs[0]
    (fused,) = network.add(
        op,
        *fc.inputs,
        *gate.inputs[num_shared:],
        outputs=[(result.dtype, result.shape)],
        before=product,
        **{name: value for name, value in fc.attrs.items() if name != "dtype"},
        dtype=result.dtype,
    )
    network.replace(result, fused)
    return True


def _are_branches(fc: Node, gate: Node) -> bool:
    """Whether both are matmuls of one kind on one input, without bias."""
    if fc.op not in _FUSED or fc.op != gate.op or fc.attrs != gate.attrs or _has_bias(fc) or _has_bias(gate):
        return False
    if fc.op == "matmul" and fc.attrs["dtype"] != fc.inputs[0].dtype:
        return False  # the fused op would round to the input's dtype on the way
    return all(fc.inputs[index] is gate.inputs[index] for index in range(_FUSED[fc.op][1]))


def _has_bias(node: Node) -> bool:
    """Whether an operand follows the activations, the weight and what belongs to it."""
    without = {"matmul": 2, "weight_only_quant_matmul": 3 + bool(node.attrs.get("has_zero")), "smooth_quant_gemm": 4}
    return len(node.inputs) > without[node.op]
