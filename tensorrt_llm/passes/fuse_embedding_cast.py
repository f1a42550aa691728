"""cast(embedding(ids, weight)) -> embedding(ids, weight) in that dtype, which reads the rows and writes them once."""

from ..network import Network


def fuse_embedding_cast(network: Network) -> int:
    """The number of casts fused with the embedding that they alone read."""
    count = 0
    for cast in [node for node in network.nodes if node.op == "cast"]:
        embedding = cast.inputs[0].producer
        if embedding is None or embedding.op != "embedding" or len(network.users(cast.inputs[0])) != 1:
            continue
        old = cast.outputs[0]
        (rows,) = network.add(
            "embedding", *embedding.inputs, outputs=[(old.dtype, old.shape)], before=embedding, dtype=old.dtype
        )
        # A debug run is shown the same numbers, in the wider dtype.
        network.replace(old, rows)
        network.replace(cast.inputs[0], rows)
        network.nodes.remove(cast)
        network.nodes.remove(embedding)
        count += 1
    return count
