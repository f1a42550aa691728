"""Rewrites of a network, in order. Each is a function that returns how often it acted."""

import logging

from ..network import Network
from .fuse_add_rms_norm import fuse_add_rms_norm
from .fuse_embedding_cast import fuse_embedding_cast
from .fuse_gated_mlp import fuse_gated_mlp
from .fuse_norm_quantize import fuse_norm_quantize
from .gather_early import gather_early
from .simplify import simplify

logger = logging.getLogger(__name__)

PASSES = (
    simplify,  # dead and repeated nodes go, so that each value has one name
    fuse_gated_mlp,  # silu(x A) * (x B) -> one op that reads x once and rounds once
    fuse_embedding_cast,  # embedding, then a cast -> one op that writes once
    gather_early,  # behind the last attention, rows whose logits are wanted are computed alone
    fuse_add_rms_norm,  # residual add, then norm -> one op that reads the residual once
    fuse_norm_quantize,  # norm, then quantization per token -> one op that rounds once
    simplify,  # what the fusions left without a reader
)


def optimize(network: Network) -> None:
    """Apply PASSES; the network is verified after each, so a broken rewrite is named."""
    for rewrite in PASSES:
        count = rewrite(network)
        try:
            network.verify()
        except AssertionError as error:
            raise AssertionError(f"pass {rewrite.__name__} broke the network: {error}") from error
        logger.info("%s: %d rewrites, %d nodes left", rewrite.__name__, count, len(network.nodes))
