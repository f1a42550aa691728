"""cast(embedding(ids, weight)) -> embedding(ids, weight) in that dtype, which reads the rows and writes them once."""

from ..network import Network


def fuse_embedding_cast(network: Network) -> int:
    """The number of casts fused with the embedding that they alone read."""
    count = 0
    for cast in [node for node in network.nodes if node.op == "cast"]:
        narrow, old = cast.inputs[0], cast.outputs[0]
        embedding = narrow.producer
        if embedding is None or embedding.op != "embedding":
            continue
        if len(network.users(narrow)) != 1 or network.is_output(narrow):
            continue
        (rows,) = network.add(
            "embedding", *embedding.inputs, outputs=[(old.dtype, old.shape)], before=embedding, dtype=old.dtype
        )
        # A debug run is shown the same numbers, in the wider dtype.
        network.replace(old, rows)
        network.replace(narrow, rows)
        network.nodes.remove(cast)
        network.nodes.remove(embedding)
        count += 1
    return count
