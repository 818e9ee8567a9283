"""Seconds of a recovery's step and of a pruning, from operations, bytes and what crosses links.

Each part of the work takes its operations over the rate at which products run, or its bytes over
the rate at which memory is read (the roofline, Williams et al. 2009, doi 10.1145/1498765.1498785).
The parts are added up: kernels run one after another. What crosses links hides behind the
arithmetic but for its last piece. Rates are shares of a card's data sheet that such work is known
to reach (`rates_of`); what a machine really reaches comes from runs there (`Rates.scaled`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparsify.comm import assign_by_size, shared_by_all
from sparsify.costs.cards import Card
from sparsify.costs.layout import Pruning, Training
from sparsify.costs.shapes import (
    ModelShape,
    compiles,
    kept_bytes,
    kept_of_token,
    num_blocks_recomputed,
)
from sparsify.models.experts import num_stacks
from sparsify.params import PruneParams, QuantParams

_PARAMS, _QUANT_PARAMS = PruneParams(), QuantParams()

_SEARCHING = ("admm", "twofour")
"""methods that search by ADMM"""

_PRODUCTS = {"A100": 0.75, "L40S": 0.70, "4090": 0.80, "5090": 0.80}
_PRODUCTS_ELSE = 0.627  # Hopper: 620 of 989.4 TFLOP/s over the products of a training step

_ATTENTION = {"A100": 0.60, "L40S": 0.45, "4090": 0.45, "5090": 0.45}
_ATTENTION_ELSE = 0.33  # Hopper, FlashAttention 2: 350 forward, 290 backward of 989.4

_BANDWIDTH, _LINK, _NETWORK = 0.78, 0.75, 0.75

# Passes over memory, in bytes per byte or element that they are about; counted in this project's
# kernels for a compiled Llama of 8B parameters.
_PER_KEPT_COMPILED = 5.3  # student forward and backward and teacher forward, of what is kept
_PER_KEPT_EAGER = 7.0
# By what a compiled block makes again beside its backward pass, of what it so frees: 17.4 GB for
# 12.7 GB, in the same kernels (docs/benchmarks/speed.md).
_PER_MADE_AGAIN = 1.4
# Over a chunk of logits of both models, float32: by one operation after another, or by
# one kernel, which reads both twice and writes the gradient once in half precision.
_HEAD_PASSES_KERNEL, _HEAD_PASSES = 5, 28
_SCORE_PASSES = 7  # over the logits of one model that is scored
_MASK_BYTES = 17.0  # for each pruned weight's gradient, once a step, or in hooks each micro-batch
_ZERO_PASSES = 9.0  # over the weights' bytes: copies, division, flattening of gradients
_ADAM_BYTES = 36.0  # for each weight: master, moments and gradient read, three of them written

_ENERGY_PRODUCTS = 2.25  # of O I^2: what a layer loses, and what it had, each 9/16 of a product
# Beside each product of the search and of the refit, that product's own reads and writes included:
# by kernels, and by one operation after another.
_SEARCH_PASSES_KERNELS, _SEARCH_PASSES = 14.0, 30.0
_CHOICE_PASSES = 200.0  # over a layer: choosing its mask, and its largest weights for the report

_HIDDEN = 0.7  # of the arithmetic, behind which links may work: not all of it is there at once

_LAUNCH_S = 5e-6
# For each column, the elimination and up to eight sweeps: at most 85 for 128 of them, where a layer
# has groups (tests/numerics/test_gptq_kernel.py).
_GPTQ_LAUNCHES = 85 / 128


@dataclass(frozen=True)
class Rates:
    """What a worker reaches."""

    products: float
    """operations/s of matrix products in the type of the weights"""
    attention: float
    """operations/s inside attention"""
    bandwidth: float
    """bytes/s of elementwise work"""
    link: float
    """bytes/s to workers of the same machine"""
    network: float
    """bytes/s to workers of other machines"""
    float32: float = 0.0
    """operations/s of products in float32; 0: as `products`"""
    launch_s: float = 0.0
    """seconds of starting one kernel"""
    overlaps: bool = True
    """whether links work while the arithmetic does"""
    disk: float = 2e9
    """bytes/s of the run's disk"""

    def scaled(self, factor: float) -> Rates:
        """The rates of a machine that takes `factor` times as long."""
        return replace(
            self, products=self.products / factor, attention=self.attention / factor,
            bandwidth=self.bandwidth / factor, float32=self.float32 / factor,
            launch_s=self.launch_s * factor,
        )  # fmt: skip


def rates_of(card: Card, element_bytes: int) -> Rates:
    """What work of this kind is known to reach on a card.

    Args:
        card: the GPU.
        element_bytes: of a weight: 2 for bf16, 4 for fp32 (no tensor cores).
    """
    family = card.words[0]
    peak = card.flops["bf16"] if element_bytes == 2 else card.flops["fp32"]
    share = _PRODUCTS.get(family, _PRODUCTS_ELSE) if element_bytes == 2 else 0.75
    return Rates(
        products=peak * share,
        attention=peak * (_ATTENTION.get(family, _ATTENTION_ELSE) if element_bytes == 2 else 0.5),
        bandwidth=card.bandwidth * _BANDWIDTH,
        link=card.link * _LINK,
        network=card.network * _NETWORK,
        float32=card.flops["fp32"] * 0.75,
        launch_s=_LAUNCH_S,
    )


def step_seconds(
    student: ModelShape,
    teacher: ModelShape | None,
    setup: Training,
    rates: Rates,
    document_tokens: float | None = None,
) -> dict[str, float]:
    """Seconds of one optimizer step of a recovery, by part.

    Args:
        student: the model that is trained.
        teacher: the dense model; None for a plain training or a cache.
        setup: how they are laid out.
        rates: of a worker.
        document_tokens: mean length of the documents in a row; None: a row is one document.

    Returns:
        Part -> seconds; the sum is the step. "exchange" is what does not hide, "launches" what a
        GPU waits for kernels to be started: those of many small experts take longer than they work.

    Raises:
        InputError: see `shapes.kept_of_token`.
    """
    tokens, width = setup.tokens, setup.element_bytes
    length = min(document_tokens or setup.sequence_length, setup.sequence_length)
    is_whole = setup.recompute == "whole"
    share = num_blocks_recomputed(student.num_blocks, setup.recompute_share) / student.num_blocks
    again = share if is_whole else 0.0
    is_compiled = compiles(student, setup.compile, setup.recompute_share)
    linear, inside = _operations(student, tokens, length)
    taught, taught_inside = (0.0, 0.0) if teacher is None else _operations(teacher, tokens, length)
    heads = 3 * student.flops.num_head_weights
    if teacher is not None and setup.uses_kl:
        heads += teacher.flops.num_head_weights
    attention = (1 + again + 2.5) * inside + taught_inside
    passes = _PER_KEPT_COMPILED * (17.0 / 24.9) if is_compiled else _PER_KEPT_EAGER
    moved = passes * kept_of_token(student, width) * tokens
    if is_whole or not is_compiled:
        moved *= 1 + share / 2
    else:
        moved += _PER_MADE_AGAIN * tokens * _freed_bytes(student, setup)
    # Without tensor cores the head's products are of float32 copies.
    of_head = rates.products if setup.uses_gpu else rates.float32 or rates.products
    in_kernel = setup.uses_gpu and setup.has_head_kernel
    weights = width * student.num_parameters
    own = student.num_parameters / (setup.world_size if setup.zero_stage else 1)
    micro = {
        "products": ((3 + again) * linear + taught) / rates.products,
        "attention": attention / rates.attention,
        "elementwise": moved / rates.bandwidth,
        "head": 2.0 * heads * tokens / of_head
        + 4.0 * (_HEAD_PASSES_KERNEL if in_kernel else _HEAD_PASSES)
        * tokens * student.vocab_size / rates.bandwidth * (1 if teacher else 0.5),
        "gradient masks": 0.0,
        "engine": (_ZERO_PASSES if setup.zero_stage else 2.0) * weights / rates.bandwidth,
    }  # fmt: skip
    masks = 0.0
    if teacher is not None:
        masks = _MASK_BYTES * student.linear_parameters / 2 * width / 2 / rates.bandwidth
    in_hooks = setup.zero_stage == 1 or setup.offload_optimizer
    if in_hooks:
        micro["gradient masks"] = masks
    # torch.compile makes few and long kernels of blocks, but where experts break them.
    if student.has_experts or not setup.compile:
        kernels = (3 + share) * student.num_kernels
        kernels += 0 if teacher is None else teacher.num_kernels
        micro["launches"] = max(0.0, rates.launch_s * kernels - sum(micro.values()))
    compute = sum(micro.values())
    found = {name: setup.num_micro_batches * seconds for name, seconds in micro.items()}
    if not in_hooks:
        found["gradient masks"] = masks / (setup.world_size if setup.zero_stage else 1)
    found["update"] = _ADAM_BYTES * own / rates.bandwidth
    found["exchange"] = _exchange(student, teacher, setup, rates, compute)
    return found


def _freed_bytes(student: ModelShape, setup: Training) -> float:
    """Bytes of a token that are made again by elementwise work instead of being kept."""
    one, shares = setup.element_bytes, (0.0, setup.recompute_share)
    whole, left = (
        kept_bytes(student, one, share, setup.compile, setup.recompute)[0] for share in shares
    )
    return max(0.0, whole - left)


def _operations(shape: ModelShape, tokens: float, length: float) -> tuple[float, float]:
    """Operations of one forward of the blocks: with weights, and inside attention."""
    linear = 2.0 * shape.flops.num_block_weights * tokens
    return linear, shape.flops.forward([length], False) * tokens / length - linear


def traffic(student: ModelShape, teacher: ModelShape | None, setup: Training) -> float:
    """Bytes that every worker sends in one step, over rings.

    A reduction of n bytes over w workers sends 2 n (w - 1) / w, a gathering or a scattering half of
    that (Rajbhandari et al. 2020, section 7).
    """
    world, width = setup.world_size, setup.element_bytes
    if world == 1:
        return 0.0
    whole = width * student.num_parameters * (world - 1) / world
    micro = setup.num_micro_batches
    if setup.zero_stage == 0:
        total = 2 * whole
    elif setup.zero_stage == 1:
        total = 3 * whole  # summed once, the new weights gathered
    elif setup.zero_stage == 2:
        total = 2 * whole * micro + whole
    else:
        total = 3 * whole * micro
    if teacher is not None and setup.teacher_placement != "replicated":
        parts = setup.gpus_per_node if setup.teacher_placement == "node" else world
        shared = (setup.teacher_bytes or width) * teacher.blocks_parameters
        total += micro * shared * (parts - 1) / parts
    return total


def _exchange(
    student: ModelShape, teacher: ModelShape | None, setup: Training, rates: Rates, compute: float
) -> float:
    """Seconds of a step in which a worker waits for its links."""
    local = max(1, setup.gpus_per_node)
    # Rings pass through a machine's workers one after another and leave it over all adapters.
    rate = rates.link if setup.world_size <= local else min(rates.link, local * rates.network)
    seconds = traffic(student, teacher, setup) / rate
    if not rates.overlaps:
        return seconds
    hidden = _HIDDEN * compute * setup.num_micro_batches
    last = min(seconds, setup.element_bytes * 200e6 / rate)
    return max(seconds - hidden, last)


def pruning_seconds(
    shape: ModelShape, setup: Pruning, rates: Rates, params: PruneParams = _PARAMS
) -> dict[str, float]:
    """Seconds of one method's walk over the blocks, by part.

    Args:
        shape: of the dense model.
        setup: how the pruning is laid out.
        rates: of a worker.
        params: of the method; its iterations and the precision of its search are read.

    Returns:
        Part -> seconds: forward (the rows through the blocks), statistics (sums of products of
        inputs), factor (Cholesky and its inverse, 2/3 I^3 operations at half the rate of products),
        solve, write, exchange, rotate.
    """
    tokens, blocks = setup.tokens, shape.num_blocks
    length = setup.sequence_length
    one_pass = shape.flops.forward([length], False) * tokens / length / rates.products
    one_pass += (
        2.0 * (shape.kept[setup.element_bytes] if shape.kept else 0) * tokens / (rates.bandwidth)
    )
    slow = rates.float32 or rates.products
    grams = solve = cross = squares = 0.0
    widths: list[int] = []
    for group in shape.groups:
        inputs, outputs = group.num_inputs, group.num_outputs
        met = group.num * group.share * tokens
        widths += group.num * [inputs]
        squares += group.num * inputs**2
        grams += met * inputs**2
        if setup.needs_teacher:
            cross += 2.0 * met * inputs * min(outputs, inputs)
        solve += group.num * outputs * inputs**2 / setup.world_size
    factor = 4.0 / 3.0 * _most_factored(widths, setup.world_size)
    products, passes = _solve_work(setup, params)
    elements = shape.linear_parameters / setup.world_size
    search = 0.0
    if setup.method in _SEARCHING and params.searches_in_half(setup.uses_gpu):
        search = 2.0 * 2 * params.admm_iterations
    slowly = products - search + _ENERGY_PRODUCTS
    found = {
        "forward": one_pass * _num_passes(setup, shape),
        "statistics": blocks * (grams + cross) / rates.products if setup.needs_hessian else 0.0,
        "factor": blocks * factor / slow if setup.needs_factor else 0.0,
        "solve": blocks * solve * (slowly / slow + search / rates.products)
        + 4.0 * passes * elements / rates.bandwidth,
        "write": setup.element_bytes * shape.num_parameters * 2 / rates.disk,
    }
    if setup.world_size > 1:  # the sums of all workers, and the rows that others solved
        sums = 0.0 if not setup.needs_hessian else (4.0 if setup.uses_gpu else 8.0) * squares
        shared = blocks * sums + setup.element_bytes * shape.linear_parameters
        found["exchange"] = shared / rates.link
    if setup.rotation_steps:
        # Read, turned, written and read again; one forward of 16 tokens for each feature before.
        few = 16 * shape.hidden_size / setup.world_size
        found["rotate"] = one_pass * few / tokens + 4 * found["write"]
    return found


def _most_factored(widths: Sequence[int], world_size: int) -> float:
    """I^3 of the worker that factors most of a block, as `calibration.factors` deals it out."""
    shared = shared_by_all({str(at): width for at, width in enumerate(widths)}, world_size)
    cubes = [width**3 for width in widths]
    alone = [cube for at, cube in enumerate(cubes) if str(at) not in shared]
    parts = assign_by_size(alone, world_size)
    together = (sum(cubes) - sum(alone)) / world_size
    return together + max(sum(alone[at] for at in part) for part in parts)


def _num_passes(setup: Pruning, shape: ModelShape) -> float:
    """Forwards of every row through every block; nobody needs what the last block puts out."""
    on = 1.0 - 1.0 / shape.num_blocks
    if not setup.needs_hessian or setup.order == "dense":
        return on
    if setup.order == "block" or shape.has_experts:
        return (2.0 if setup.needs_teacher else 0.9) + on
    held = 2.0 if setup.needs_teacher else 1.0
    return held if setup.on_device else 2.2 * held


def _solve_work(setup: Pruning, params: PruneParams) -> tuple[float, float]:
    """Operations for each O I^2 of a layer, and passes over its O I weights."""
    admm, refit = params.admm_iterations, params.refit_iterations
    if setup.method in ("magnitude", "wanda"):
        return 0.0, _CHOICE_PASSES
    each = _SEARCH_PASSES_KERNELS if setup.uses_gpu else _SEARCH_PASSES
    if setup.method in _SEARCHING:
        target = 3 if setup.method == "twofour" else 0
        has_kernels = setup.uses_gpu and setup.has_search_kernels
        search = _SEARCH_PASSES_KERNELS if has_kernels else _SEARCH_PASSES
        rest = 3 if has_kernels else 4
        passes = _CHOICE_PASSES + search * 2 * admm + each * refit
        return 2.0 * (2 * admm + refit + rest + target), passes
    if setup.method == "sparsegpt_refit":
        return 1.0 + 2.0 * (refit + 5), _CHOICE_PASSES + 60.0 + each * refit
    return 1.0 + (2.0 if setup.needs_teacher else 0.0), _CHOICE_PASSES + 60.0


def forward_seconds(shape: ModelShape, tokens: float, length: int, rates: Rates) -> float:
    """Seconds of scoring: one forward with the head over `tokens` tokens in rows of `length`."""
    operations = shape.flops.forward([length], True) * tokens / length
    passes = 4.0 * _SCORE_PASSES * tokens * shape.vocab_size
    return operations / rates.products + passes / rates.bandwidth


def quantizing_seconds(
    shape: ModelShape, setup: Pruning, rates: Rates, params: QuantParams = _QUANT_PARAMS
) -> dict[str, float]:
    """Seconds of quantising with zeros kept, by part as `pruning_seconds` has them.

    GPTQ is SparseGPT's walk; with launches for its columns, on a GPU those of one expert for a
    stack of them; with the product that descent begins with and one in each of its sweeps; and with
    a teacher with two products more than are in the walk, by which the target moves.

    Args:
        shape: of the model.
        setup: how the walk is laid out; its method is rtn, or gptq is meant.
        rates: of a worker.
        params: of the quantiser; its sweeps are read.
    """
    walk = pruning_seconds(shape, replace(setup, method="sparsegpt", rotation_steps=0), rates)
    if setup.method == "rtn":
        return walk
    columns, products = 0, 2.0 + 2.0 * params.num_refine_sweeps
    products += 4.0 if setup.needs_teacher else 0.0
    operations = 0.0
    for group in shape.groups:
        operations += products * group.num * group.num_outputs * group.num_inputs**2
        most = max(rows for rows, _ in group.layers)
        num = num_stacks(group.num, most, group.num_inputs) if setup.uses_gpu else group.num
        columns += num * len(group.layers) * group.num_inputs
    walk["solve"] += shape.num_blocks * (
        columns * _GPTQ_LAUNCHES * rates.launch_s
        + operations / setup.world_size / (rates.float32 or rates.products)
    )
    return walk


def total(parts: dict[str, float] | Sequence[float]) -> float:
    """Their sum."""
    return sum(parts.values() if isinstance(parts, dict) else parts)
