"""Which matmuls an engine has, and the tactics that timings beside it hold for them on a GPU.

An engine's folder may have been edited, and other versions have other candidates: what is stored for a matmul is taken
only if it is one of the op's own.
"""

import logging
from collections.abc import Iterable

import torch

from ..dtype import torch_dtype
from ..engine import Engine
from ..kernels.tactics import BUCKETS, MATMULS, MatmulShape, Tactic, Tactics, candidates
from ..plan import Plan, PlanNode, TensorSpec
from ..timings import FILE_NAME, MatmulTiming, read_timings

logger = logging.getLogger(__name__)


def stored_tactics(engine: Engine, device: torch.device) -> Tactics:
    """The timed tactics of a GPU of this name; heuristics where there are none."""
    # Batch-invariant kernels multiply in one way, and an engine in memory has no folder.
    if device.type != "cuda" or engine.config.batch_invariant or engine.path is None:
        return Tactics()
    name = torch.cuda.get_device_name(device)
    gpus = read_timings(engine.path.parent)
    if name not in gpus:
        found = f"timed on {', '.join(gpus)} only" if gpus else "nothing is timed"
        logger.info("tactics are chosen by heuristics: %s, this is %s", found, name)
        return Tactics()
    try:
        timed = checked_tactics(gpus[name].timings, matmuls_of(engine.plan))
    except ValueError as error:
        path = engine.path.parent / FILE_NAME
        raise ValueError(f"{path}: gpus[{name!r}]: {error}; delete the file, or tune again after that") from error
    logger.info("%d tactics are chosen by timings of %s", len(timed), name)
    outdated = len(gpus[name].timings) - len(timed)
    if outdated:
        logger.warning(
            "%s: %d of %d tactics are none that this version would time; heuristics choose there, or tune again",
            engine.path.parent / FILE_NAME,
            outdated,
            len(gpus[name].timings),
        )
    return Tactics(timed)


def checked_tactics(
    timings: Iterable[MatmulTiming], shapes: Iterable[MatmulShape]
) -> dict[tuple[MatmulShape, int], Tactic]:
    """The winners as tactics, but those that are no candidates; a ValueError when one is of no matmul of `shapes`."""
    known = set(shapes)
    timed: dict[tuple[MatmulShape, int], Tactic] = {}
    for index, timing in enumerate(timings):
        try:
            shape, winner = _checked(timing, known)
        except ValueError as error:
            raise ValueError(f"timings[{index}]: {error}") from error
        if winner:
            timed[shape, timing.tokens] = winner
    return timed


def _checked(timing: MatmulTiming, known: set[MatmulShape]) -> tuple[MatmulShape, Tactic | None]:
    shape = MatmulShape(
        timing.op,
        timing.rows,
        timing.depth,
        torch_dtype(timing.dtype),
        timing.bits,
        timing.num_groups,
        timing.has_zero,
    )
    if shape not in known:
        raise ValueError(f"the engine has no {timing.op} of {timing.rows} x {timing.depth} in {timing.dtype} like this")
    if timing.tokens not in BUCKETS:
        raise ValueError(f"tokens is {timing.tokens}, expected one of {', '.join(map(str, BUCKETS))}")
    by_name = {str(tactic): tactic for tactic in candidates(shape, timing.tokens)}
    return shape, by_name.get(timing.winner)


def specs_of(plan: Plan) -> dict[str, TensorSpec]:
    """All values of a plan by name."""
    made = (spec for node in plan.nodes for spec in node.outputs)
    return {spec.name: spec for spec in (*plan.inputs, *plan.weights, *made)}


def matmuls_of(plan: Plan) -> dict[MatmulShape, PlanNode]:
    """The distinct matmuls, each with its first node."""
    specs = specs_of(plan)
    found: dict[MatmulShape, PlanNode] = {}
    for node in plan.nodes:
        shape = _shape_of(node, specs) if node.op in MATMULS else None
        if shape is not None:
            found.setdefault(shape, node)
    return found


def _shape_of(node: PlanNode, specs: dict[str, TensorSpec]) -> MatmulShape | None:
    """None for a node that is no call of its op, which the executor says."""
    operands = [specs[name] for name in node.inputs]
    first_weight = 2 if node.op.startswith("smooth_quant") else 1
    has_scale = node.op.startswith("weight_only")
    matrices = operands[first_weight : first_weight + 1 + has_scale]
    if len(matrices) < 1 + has_scale or any(len(spec.shape) != 2 for spec in (operands[0], *matrices)):
        return None
    depth, rows, groups = operands[0].shape[1], matrices[0].shape[0], matrices[-1].shape[1]
    if not isinstance(depth, int) or not isinstance(rows, int) or not isinstance(groups, int):
        return None
    bits = 8 if first_weight == 2 else node.attrs.get("bits", 0)
    return MatmulShape(
        node.op,
        2 * rows if node.op.endswith("gated_mlp") else rows,
        depth,
        torch_dtype(operands[0].dtype),
        int(bits) if isinstance(bits, int) else 0,
        groups if has_scale else 1,
        bool(node.attrs.get("has_zero", False)),
    )
