"""rms_norm(gather_last_token(x + y)) -> gather_last_token(rms_norm(x + y)): the sum then is one op with its norm.

A row is normed by itself, so it does not matter which others are there. A step of decodes gathers all rows anyway.
"""

from ..network import Network, Node


def gather_after_norm(network: Network) -> int:
    """The number of norms that moved in front of the gather they read."""
    count = 0
    for norm in [node for node in network.nodes if node.op == "rms_norm"]:
        gather = norm.inputs[0].producer
        if gather is None or gather.op != "gather_last_token":
            continue
        total = gather.inputs[0].producer
        if total is None or total.op != "add" or all(addend.dtype != "float32" for addend in total.inputs):
            continue
        if network.is_visible(gather.outputs[0]) or len(network.users(gather.outputs[0])) != 1:
            continue
        _swap(network, gather, norm)
        count += 1
    return count


def _swap(network: Network, gather: Node, norm: Node) -> None:
    rows, old = gather.inputs[0], norm.outputs[0]
    (normed,) = network.add(
        "rms_norm", rows, norm.inputs[1], outputs=[(old.dtype, rows.shape)], before=norm, **norm.attrs
    )
    (gathered,) = network.add(
        "gather_last_token", normed, gather.inputs[1], outputs=[(old.dtype, old.shape)], before=norm
    )
    network.replace(old, gathered)
    network.nodes.remove(norm)
    network.nodes.remove(gather)
