"""silu(x A^T) * (x B^T) -> gated_mlp(x, A, B): one read of x, one rounding, one kernel for the activation."""

from typing import TypeGuard

from ..network import Network, Node, Tensor


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
    if silu is None or silu.op != "silu" or not _is_plain_matmul(gate):
        return False
    fc = silu.inputs[0].producer
    if not _is_plain_matmul(fc) or fc.inputs[0] is not gate.inputs[0]:
        return False
    inner = (fc.outputs[0], activated, linear)
    if any(network.is_visible(tensor) or len(network.users(tensor)) != 1 for tensor in inner):
        return False
    result = product.outputs[0]
    (fused,) = network.add(
        "gated_mlp",
        fc.inputs[0],
        fc.inputs[1],
        gate.inputs[1],
        outputs=[(result.dtype, result.shape)],
        before=product,
        dtype=result.dtype,
    )
    network.replace(result, fused)
    return True


def _is_plain_matmul(node: Node | None) -> TypeGuard[Node]:
    """A matmul without bias whose result keeps its input's dtype."""
    if node is None or node.op != "matmul":
        return False
    return len(node.inputs) == 2 and node.attrs["dtype"] == node.inputs[0].dtype
