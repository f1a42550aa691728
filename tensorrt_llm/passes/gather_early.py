"""gather_last_token(f(x)) -> f(gather_last_token(x)), for every f that computes each row of its result from that of x.

Logits are wanted of a prompt's last token only, and nothing but logits reads what comes behind the last attention: so
the projection, the MLP and the norms of the last layer compute the rows whose logits are wanted, not those of all
tokens. A step of decodes wants all rows, and gathers nothing.
"""

from ..network import Network, Node, Tensor

# Attention mixes tokens, and an embedding reads no rows. What other passes fuse comes later.
_ROW_BY_ROW = frozenset(
    {
        "add",
        "allreduce",
        "cast",
        "gated_mlp",
        "matmul",
        "mul",
        "permute_columns",
        "quantize_per_token",
        "quantize_tensor",
        "rms_norm",
        "scale_columns",
        "silu",
        "smooth_quant_gated_mlp",
        "smooth_quant_gemm",
        "weight_only_gated_mlp",
        "weight_only_quant_matmul",
    }
)


def gather_early(network: Network) -> int:
    """The number of nodes that came behind the gather."""
    count = 0
    for gather in [node for node in network.nodes if node.op == "gather_last_token"]:
        nodes = _read_through(network, gather)
        if nodes:
            _move_behind(network, gather, nodes)
        count += len(nodes)
    return count


def _read_through(network: Network, gather: Node) -> list[Node]:
    """The nodes in front of the gather, in order, that work row by row and that nobody else reads."""
    found: list[Node] = []
    for node in reversed(network.nodes[: network.nodes.index(gather)]):
        users = [user for made in node.outputs for user in network.users(made)]
        if (
            node.op in _ROW_BY_ROW
            and _is_by_row(node.outputs[0], gather)
            and all(user is gather or user in found for user in users)
            and not any(network.is_output(made) for made in node.outputs)
        ):
            found.append(node)
    return found[::-1]


def _is_by_row(tensor: Tensor, gather: Node) -> bool:
    """Whether `tensor` has the rows that are gathered from."""
    return tensor.shape[0] == gather.inputs[0].shape[0]


def _move_behind(network: Network, gather: Node, nodes: list[Node]) -> None:
    last_token_ids, num_rows = gather.inputs[1], gather.outputs[0].shape[0]
    gathered: dict[Tensor, Tensor] = {}
    for node in nodes:
        for read in node.inputs:
            if _is_by_row(read, gather) and read.producer not in nodes and read not in gathered:
                (gathered[read],) = network.add(
                    gather.op,
                    read,
                    last_token_ids,
                    outputs=[(read.dtype, (num_rows, *read.shape[1:]))],
                    before=node,
                )
        node.inputs = tuple(gathered.get(read, read) for read in node.inputs)
    for made in [made for node in nodes for made in node.outputs if _is_by_row(made, gather)]:
        made.shape = (num_rows, *made.shape[1:])
    network.replace(gather.outputs[0], gather.inputs[0])
    network.nodes.remove(gather)
