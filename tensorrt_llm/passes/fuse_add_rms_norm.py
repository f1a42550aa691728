"""s = x + y, then rms_norm(s) -> add_rms_norm(x, y), which makes both and reads the float32 residual once."""

from ..network import Network, Node


def fuse_add_rms_norm(network: Network) -> int:
    """The number of norms fused with the sum they read."""
    count = 0
    for norm in [node for node in network.nodes if node.op == "rms_norm"]:
        total = norm.inputs[0].producer
        if total is None or total.op != "add" or all(addend.dtype != "float32" for addend in total.inputs):
            continue
        _fuse(network, total, norm)
        count += 1
    return count


def _fuse(network: Network, total: Node, norm: Node) -> None:
    # The residual comes first: it is float32 already, what a layer adds may be narrower.
    residual, addend = sorted(total.inputs, key=lambda tensor: tensor.dtype != "float32")
    old_sum, old_norm = total.outputs[0], norm.outputs[0]
    new_sum, new_norm = network.add(
        "add_rms_norm",
        residual,
        addend,
        norm.inputs[1],
        outputs=[(old_sum.dtype, old_sum.shape), (old_norm.dtype, old_norm.shape)],
        before=total,
        **norm.attrs,
    )
    network.replace(old_sum, new_sum)
    network.replace(old_norm, new_norm)
    network.nodes.remove(total)
    network.nodes.remove(norm)
