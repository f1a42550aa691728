"""Dead nodes go; of nodes that compute the same, the first stays."""

import json

from ..network import Network, Node

# An attention also writes the cache, so two of them are never one.
_WRITES = frozenset({"gpt_attention"})


def simplify(network: Network) -> int:
    """The number of nodes removed."""
    return _merge_repeated_nodes(network) + network.remove_dead_nodes()


def _merge_repeated_nodes(network: Network) -> int:
    first_of: dict[object, Node] = {}
    repeated: list[Node] = []
    for node in network.nodes:
        if node.op in _WRITES:
            continue
        key = (node.op, tuple(id(read) for read in node.inputs), json.dumps(node.attrs, sort_keys=True))
        first = first_of.setdefault(key, node)
        if first is not node:
            repeated.append(node)
            for old, new in zip(node.outputs, first.outputs, strict=True):
                network.replace(old, new)
    network.nodes = [node for node in network.nodes if node not in repeated]
    return len(repeated)
