"""Which parameters of a model are matrices that S2D looks at, and why the others are not."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from s2d_kernels import ops

logger = logging.getLogger("s2d_kernels")

# Modules that make outputs, the first few with all they hold. A `head` may be more: SigLIP's pools with attention.
HEAD = re.compile(
    r"(^|\.)((lm_head|classifier|predictions)(\.|$)|(head|head\.fc|head_dist|cls_classifier|distillation_classifier"
    r"|score|qa_outputs|seq_relationship|output_projection|embed_out)$)"
)
# Projections whose row thirds are queries, keys and values.
FUSED_QKV = re.compile(r"(^|[._])(qkv|qkv_proj|c_attn|wqkv|in_proj)$", re.IGNORECASE)
# GPT-NeoX, BLOOM and Falcon have them in turn head by head, ChatGLM in unequal parts.
INTERLEAVED_QKV = re.compile(r"(^|[._])query_key_value$", re.IGNORECASE)
ADAPTIVE = re.compile(r"adam|rmsprop|adagrad|adadelta|adafactor|lamb|lion|muon|sophia|shampoo|soap", re.IGNORECASE)
_COMPILED = re.compile(r"\b_orig_mod\.")  # torch.compile puts its own level into names
ADAPTER = re.compile(r"lora_(A|B|embedding)|(^|\.)adapter", re.IGNORECASE)


FROZEN = "frozen"  # a reason


class ParameterDecision(NamedTuple):
    """One row of the selection log: parameter name, its shape, "penalize" or "skip", and the reason."""

    name: str
    shape: tuple[int, ...]
    decision: str
    reason: str


@dataclass(frozen=True)
class Matrix:
    """One matrix `[m, n]` that maps a token: a parameter, or a block of its rows (`name` then ends in `[a:b]`).

    `kind` is "linear", "patch" (a convolution whose kernel equals its stride) or "attention" (the packed input
    projection of `nn.MultiheadAttention`). `module` holds the parameter as `attribute`; `twins` are other modules that
    hold the same one.
    """

    name: str
    kind: str
    module: nn.Module
    parameter: nn.Parameter
    start: int
    stop: int
    twins: tuple[nn.Module, ...] = ()
    attribute: str = "weight"

    def rows(self, tensor: Tensor) -> Tensor:
        """The `[m, n]` rows of the parameter, or of a tensor of its shape such as its gradient.

        A view wherever memory allows; a channels_last kernel gives a copy, which `write_back` returns.
        """
        if tensor.ndim != 2:
            tensor = tensor.reshape(tensor.shape[0], -1)
        return tensor[self.start : self.stop]

    def write_back(self, tensor: Tensor, rows: Tensor) -> None:
        """Store changed `rows(tensor)` in `tensor`, if they were a copy."""
        if rows.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            tensor[self.start : self.stop].copy_(rows.view(rows.shape[0], *tensor.shape[1:]))

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.stop - self.start, self.parameter[0].numel()


def find_matrices(
    model: nn.Module,
    *,
    k_max: int = 3,
    select: Sequence[tuple[str, bool]] = (),
    splits: Mapping[str, Sequence[int]] | None = None,
) -> tuple[list[Matrix], list[ParameterDecision]]:
    """Decide every parameter of `model` once, with a reason.

    Args:
        model: any module.
        k_max: matrices with min(m, n) <= 2 k_max are skipped: their PCDR_k_max is near 1 with or without outliers.
        select: (regex, penalize) pairs searched in the parameter name, first match wins. False skips; True overrides
            the skips that go by name or size (heads, adapters, small matrices), never those by kind.
        splits: regex -> row counts of a fused projection, e.g. {"qkv_proj": [4096, 1024, 1024]}.

    Returns:
        The matrices, and one `ParameterDecision` per parameter in the order of `named_parameters`.

    Raises:
        ValueError: a pattern matches no parameter, or a split does not add up.
        NotImplementedError: a parameter is a DTensor, belongs to DeepSpeed ZeRO, or has an optimizer in the backward;
            nn.DataParallel on several GPUs.
    """
    if any(isinstance(module, nn.DataParallel) and len(module.device_ids) > 1 for module in model.modules()):
        raise NotImplementedError(
            "S2D under nn.DataParallel is not supported: its replicas each see a part of the batch. Train on one GPU"
        )
    splits = dict(splits or {})
    _check_patterns(select, splits)
    unmatched = {pattern for pattern, _ in select} | set(splits)
    occurrences: dict[int, list[str]] = {}
    owners: dict[str, tuple[nn.Module, str]] = {}
    for name, module, attribute in _named_owners(model):
        occurrences.setdefault(id(getattr(module, attribute)), []).append(name)
        owners[name] = (module, attribute)

    matrices: list[Matrix] = []
    decisions: list[ParameterDecision] = []
    for name, (module, attribute) in owners.items():
        parameter = getattr(module, attribute)
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"parameter {name!r} has no shape yet (a lazy module): run one forward before S2D")
        check_whole(name, parameter)
        shape = tuple(parameter.shape)
        hits = [(pattern, penalize) for pattern, penalize in select if re.search(pattern, name)]
        split = next((sizes for pattern, sizes in splits.items() if re.search(pattern, name)), None)
        unmatched -= {pattern for pattern, _ in hits} | {p for p in splits if re.search(p, name)}
        chosen = hits[0] if hits else None

        kind, reason = _kind(module, attribute, parameter)
        if parameter.numel() == 0:
            kind, reason = None, "empty"
        others = [n for n in occurrences[id(parameter)] if n != name]
        earlier = occurrences[id(parameter)].index(name) > 0
        modules_of_others = [type(owners[n][0]) for n in others]
        if kind is not None:
            if any(issubclass(owner, nn.Embedding) for owner in modules_of_others):
                kind, reason = None, f"tied to the embedding {others[0]}"
            elif earlier:
                kind, reason = None, f"tied to {occurrences[id(parameter)][0]}"
            elif chosen is not None and not chosen[1]:
                kind, reason = None, f"skipped by pattern {chosen[0]!r}"
            elif chosen is None:
                stem = name.rsplit(".", 1)[0]
                if HEAD.search(stem):
                    kind, reason = None, "output head"
                elif ADAPTER.search(name):
                    kind, reason = None, "low-rank adapter"
        if kind is None:
            decisions.append(ParameterDecision(name, shape, "skip", reason))
            continue
        sizes = _row_blocks(name, kind, parameter, split) if parameter.requires_grad else [shape[0]]
        rank = min(*sizes, parameter[0].numel())
        if rank <= 2 * k_max and chosen is None:
            reason = f"only {rank} singular values: PCDR_{min(rank, k_max)} is close to 1 whatever they are"
            decisions.append(ParameterDecision(name, shape, "skip", reason))
            continue
        if not parameter.requires_grad:  # the last reason: what is unfrozen later would be penalized but for it
            decisions.append(ParameterDecision(name, shape, "skip", FROZEN))
            continue
        if len(sizes) == 1 and split is None and FUSED_QKV.search(name.rsplit(".", 1)[0]):
            reason += "; looks like a fused projection of unequal parts: splits= treats each as its own matrix"
        if split is None and INTERLEAVED_QKV.search(name.rsplit(".", 1)[0]):
            reason += "; looks like a fused projection: it counts as one matrix, unless splits= cuts its rows"
        if len(sizes) > 1:
            reason += f", fused: {len(sizes)} matrices of {', '.join(map(str, sizes))} rows"
        if chosen is not None:
            reason += f", by pattern {chosen[0]!r}"
        decisions.append(ParameterDecision(name, shape, "penalize", reason))
        twins = [owners[n][0] for n in others if _kind(*owners[n], parameter)[0] == kind]
        start = 0
        for size in sizes:
            suffix = f"[{start}:{start + size}]" if len(sizes) > 1 else ""
            place = (start, start + size)
            matrices.append(Matrix(name + suffix, kind, module, parameter, *place, tuple(twins), attribute))
            start += size
    if unmatched:
        raise ValueError(f"pattern(s) {sorted(unmatched)} match no parameter; names look like {list(owners)[:5]}")
    return matrices, decisions


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model without torch.compile's, DistributedDataParallel's and DataParallel's own level."""
    while True:
        compiled = getattr(model, "_orig_mod", None)  # asking for the type would import the compiler
        if isinstance(compiled, nn.Module):
            model = compiled
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _named_owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Each parameter's name without what wrappers add, the module that holds it, and as what; tied ones repeatedly."""
    for prefix, module in _unwrapped(model).named_modules(remove_duplicate=True):
        for attribute, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            yield _COMPILED.sub("", f"{prefix}.{attribute}" if prefix else attribute), module, attribute


def check_one_device(matrices: Sequence[Matrix]) -> None:
    """Raise a NotImplementedError where the matrices are not on one device that holds data."""
    places = {str(matrix.parameter.device): matrix.name for matrix in matrices}
    if len(places) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in list(places.items())[:3])
        raise NotImplementedError(
            f"S2D on a model spread over {len(places)} devices is not supported yet ({where}): put it on one"
        )
    if "meta" in places:
        raise NotImplementedError(f"parameter {places['meta']!r} is on the meta device: load the weights before S2D")


def log_selection(
    model: nn.Module, matrices: Sequence[Matrix], decisions: Sequence[ParameterDecision], *, warn_of_rounding: bool
) -> None:
    """Log each decision at INFO, and warn of a model with nothing to penalize or with weights that round decay away."""
    for decision in decisions:
        logger.info("S2D %s: %s %s: %s", decision.decision, decision.name, list(decision.shape), decision.reason)
    if not matrices:
        logger.warning(
            "S2D found nothing to penalize among %d parameters of %s: see S2D.decisions for the reasons, "
            "select=[(regex, True)] overrides those that go by name",
            len(decisions),
            type(model).__name__,
        )
    low = [m.name for m in matrices if m.parameter.dtype in (torch.bfloat16, torch.float16)]
    if low and warn_of_rounding:
        logger.warning(
            "S2D decoupled: %d matrices (first: %s) are in bf16 or fp16, which rounds most of a small decay away: "
            "keep fp32 weights, or in bf16 use rounding='stochastic'",
            len(low),
            low[0],
        )


def frozen_parameters(model: nn.Module, decisions: Sequence[ParameterDecision]) -> dict[str, tuple[nn.Module, str]]:
    """By name, the module and attribute of what is left alone for no reason but that it is frozen."""
    names = {decision.name for decision in decisions if decision.reason == FROZEN}
    return {name: (module, attribute) for name, module, attribute in _named_owners(model) if name in names}


def warn_of_unfrozen(frozen: dict[str, tuple[nn.Module, str]]) -> None:
    """Log once where some of them are trained after all."""
    now = {name: module._parameters.get(attribute) for name, (module, attribute) in frozen.items()}
    trained = [name for name, parameter in now.items() if parameter is not None and parameter.requires_grad]
    if trained:
        logger.warning(
            "S2D: %d parameters that were frozen when it was built are trained now, without a penalty (first: %s): "
            "build S2D after unfreezing",
            len(trained),
            trained[0],
        )
        frozen.clear()


def check_whole(name: str, parameter: Tensor) -> None:
    """Raise a NotImplementedError where a parameter's weight or gradient is not there as one ordinary tensor.

    Frameworks take parameters over at different moments, some after S2D was built: it asks again before it acts.
    """
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        raise NotImplementedError(
            f"parameter {name!r} belongs to DeepSpeed ZeRO, which keeps gradients and fp32 weights in flat buffers of "
            "its own: S2D cannot reach them. Train with zero_optimization stage 0, or without DeepSpeed"
        )
    if hasattr(parameter, "_in_backward_optimizers"):
        raise NotImplementedError(
            f"parameter {name!r} is updated by an optimizer in the backward, which takes its gradient before S2D could "
            "act: step the optimizer after backward() instead"
        )
    if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
        raise NotImplementedError(
            f"parameter {name!r} is a DTensor: sharded models (FSDP2, tensor parallelism) are not supported yet"
        )


def check_supported(matrices: Sequence[Matrix]) -> None:
    """What is checked when an S2D is built, again: trainers change processes and parameters after it.

    Raises:
        ValueError: a module no longer holds the parameter that was found in it.
        NotImplementedError: as `check_processes`, `check_one_device` and `check_whole`.
    """
    check_processes()
    for matrix in matrices:
        check_whole(matrix.name, matrix.parameter)
        check_held(matrix)
    check_one_device(matrices)


def check_held(matrix: Matrix) -> None:
    """Raise a ValueError where the model trains another parameter in the place of the matrix's.

    A parametrization, or pruning, may keep the parameter under another name of the module: it is trained all the same.
    """
    for module in (matrix.module, *matrix.twins):
        if module._parameters.get(matrix.attribute) is matrix.parameter:
            continue
        if not any(parameter is matrix.parameter for parameter in module.parameters()):
            current = module._parameters.get(matrix.attribute)
            if current is not None:
                check_whole(matrix.name, current)
            raise ValueError(
                f"parameter {matrix.name!r} was replaced after S2D was built, so that S2D would act on a tensor that "
                "the model no longer has: build S2D anew after the change, or load the weights into the old "
                "parameters, which load_state_dict does without assign=True"
            )


def check_gradients_kept(matrices: Sequence[Matrix]) -> None:
    """Raise a NotImplementedError where matrices that ran forward have hooks that take their gradients away."""
    taken = [m.name for m in matrices if getattr(m.parameter, "_post_accumulate_grad_hooks", None)]
    if taken:
        raise NotImplementedError(
            f"{taken[0]!r} and {len(taken) - 1} more have run forward, but their gradients are gone, and they have "
            "hooks that run when a gradient is complete: S2D cannot act with an optimizer in the backward. Step it "
            "after backward() instead"
        )


def checked_rate(matrix: Matrix, lr: object) -> float:
    """A learning rate of the matrix, 0 where it is frozen; a ValueError where it is negative or not finite."""
    rate = ops.check_number(f"lr of {matrix.name!r}", lr)
    if rate < 0:
        raise ValueError(f"lr={rate} of {matrix.name!r} must not be negative")
    return rate if matrix.parameter.requires_grad else 0.0


def check_processes() -> None:
    """Raise a NotImplementedError where torch.distributed runs more than one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world = torch.distributed.get_world_size()
        if world > 1:
            raise NotImplementedError(
                f"S2D on {world} processes is not supported yet: each would decide from its own batch, and the "
                "weights would drift apart"
            )


class ParameterGroups:
    """The optimizer's parameter group of each matrix.

    Looking all parameters up costs more than the rest of a step's bookkeeping, so the answer is kept for as long as
    the optimizers hold the same groups with the same parameters; `load_state_dict` replaces them.

    Args:
        matrices: as `find_matrices` returns them.
        optimizers: those that hold the parameters.
    """

    def __init__(self, matrices: Sequence[Matrix], optimizers: Sequence[Optimizer]) -> None:
        self._matrices = matrices
        self._optimizers = optimizers
        self._seen: list[tuple[dict[str, Any], list[Tensor], int]] = []
        self._by_name: dict[str, dict[str, Any]] = {}

    def __call__(self) -> dict[str, dict[str, Any]]:
        """Matrix name -> group, for the matrices that the optimizers hold."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        if len(groups) != len(self._seen) or any(
            group is not known or group["params"] is not params or len(params) != count
            for group, (known, params, count) in zip(groups, self._seen, strict=True)
        ):
            by_parameter = {id(p): group for group in groups for p in group["params"]}
            self._by_name = {
                m.name: by_parameter[id(m.parameter)] for m in self._matrices if id(m.parameter) in by_parameter
            }
            self._seen = [(group, group["params"], len(group["params"])) for group in groups]
        return self._by_name

    def trained(self) -> set[str]:
        """Names of the matrices that the optimizers hold and that have a gradient in this step."""
        held = self()
        return {
            m.name
            for m in self._matrices
            if m.name in held and m.parameter.requires_grad and m.parameter.grad is not None
        }

    def rates(self, trained: set[str] | None = None) -> dict[str, float]:
        """The learning rate of every matrix, 0 for those that this step leaves alone: all but the `trained` ones."""
        groups, trained = self(), self.trained() if trained is None else trained
        # A learning rate on a device is read once a group: each reading waits for the device.
        read = {id(group): float(group["lr"]) for group in groups.values()}
        return {m.name: read[id(groups[m.name])] if m.name in trained else 0.0 for m in self._matrices}

    @property
    def adaptive(self) -> bool:
        """Whether any optimizer divides gradients by their own size, so that a penalty's strength hardly matters."""
        return any(ADAPTIVE.search(type(optimizer).__name__) for optimizer in self._optimizers)

    def effective_rates(self) -> dict[str, float]:
        """What a constant gradient moves a matrix by per step in the long run: momentum multiplies the learning rate.

        Empty for adaptive optimizers, where nothing can be said.
        """
        if self.adaptive:
            return {}
        groups = self()
        read = {id(group): group for group in groups.values()}
        rates = {key: _effective_rate(group) for key, group in read.items()}
        return {name: rates[id(group)] for name, group in groups.items()}


def _effective_rate(group: Mapping[str, Any]) -> float:
    momentum = float(group.get("momentum", 0.0))
    if momentum == 0.0:
        return float(group["lr"])
    return float(group["lr"]) * (1 - float(group.get("dampening", 0.0))) / max(1 - momentum, 1e-12)


def _check_patterns(select: object, splits: Mapping[str, Sequence[int]]) -> None:
    pairs = list(select) if isinstance(select, Sequence) and not isinstance(select, str) else [select]
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise TypeError(f"select must hold (regex, penalize) pairs such as ('lm_head', False), got {pair!r}")
    patterns: list[Any] = [*pairs, *((pattern, True) for pattern in splits)]
    for pattern, _ in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error


def _kind(module: nn.Module, attribute: str, parameter: nn.Parameter) -> tuple[str | None, str]:
    """Kind of matrix a parameter is, or None, with the reason."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return None, "embedding"
    if isinstance(module, nn.MultiheadAttention) and attribute == "in_proj_weight":
        return "attention", "packed attention projection"
    if type(module).__name__ == "NonDynamicallyQuantizableLinear" and attribute == "weight":
        return None, "nn.MultiheadAttention applies it as a function: its activations cannot be captured"
    if isinstance(module, nn.Linear) and attribute == "weight":
        return "linear", "linear layer"
    if isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, nn.Conv2d) and attribute == "weight":
        return None, f"{type(module).__name__}: only two-dimensional patch embeddings are supported"
    if isinstance(module, nn.Conv2d) and attribute == "weight":
        tiles = module.kernel_size == module.stride and module.padding in ((0, 0), "valid", 0)
        if tiles and module.dilation == (1, 1) and module.groups == 1 and module.padding_mode == "zeros":
            return "patch", "patch embedding (kernel = stride), as a linear layer"
        return None, "convolution with overlapping windows"
    if parameter.ndim < 2:
        return None, "not a matrix"
    if parameter.ndim == 3 and attribute.endswith(("weight", "proj", "experts")):
        return None, "stack of expert matrices: not supported yet"
    return None, f"{attribute} of {type(module).__name__}: not a known linear layer"


def _row_blocks(name: str, kind: str, parameter: nn.Parameter, split: Sequence[int] | None) -> list[int]:
    rows, columns = parameter.shape[0], parameter[0].numel()
    if split is not None:
        if sum(split) != rows or min(split) < 1:
            raise ValueError(f"split {list(split)} of {name!r} must be positive and add up to its {rows} rows")
        third = rows // 3
        if kind == "attention" and any(
            sum(split[:i]) // third != (sum(split[: i + 1]) - 1) // third for i in range(len(split))
        ):
            raise ValueError(
                f"split {list(split)} of {name!r} mixes queries, keys and values, whose rows begin at 0, {third} and "
                f"{2 * third}"
            )
        return list(split)
    stem = name.rsplit(".", 1)[0]
    if kind == "attention" or (FUSED_QKV.search(stem) and rows == 3 * columns):
        return [rows // 3] * 3
    return [rows]
