"""The engine of calibrated methods, behind quantize() and from_pretrained: data, plan, walk, account."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.block import PackedParameter
from hf_lowbit.calibration.checkpoint import Checkpoint, fingerprint_of, unshared
from hf_lowbit.calibration.data import CalibrationData, prepare_data
from hf_lowbit.calibration.low_rank import Compensation
from hf_lowbit.calibration.parallel import processes, rank, wait_for_all
from hf_lowbit.calibration.peak import predict_peak
from hf_lowbit.calibration.placement import BlockWeights, Placement, PlacementError
from hf_lowbit.calibration.predictions import Predictions
from hf_lowbit.calibration.snapshot import remember
from hf_lowbit.calibration.store import TensorStore, default_limit
from hf_lowbit.calibration.tuning import tune
from hf_lowbit.calibration.units import ready
from hf_lowbit.calibration.walk import Walk
from hf_lowbit.config import LowbitConfig
from hf_lowbit.formats import PackedTensor
from hf_lowbit.integrations.finish import finish_quantization, library_versions
from hf_lowbit.integrations.loading import forget_ties, model_facts, processing_of
from hf_lowbit.method import Recipe, Refine
from hf_lowbit.nn import PackedModule
from hf_lowbit.plan import Plan, build_plan, packed_modules, replace_modules
from hf_lowbit.state import shared_weights
from hf_lowbit.tensorwise import Outcome, pack_parameter
from hf_lowbit.testbed.cache import cache_home

logger = logging.getLogger("hf_lowbit")


@dataclass(frozen=True)
class Run:
    """How one calibration runs.

    Attributes:
        undo: keep the float layers until the end, so that a failure leaves the model as it was.
        folder: where finished blocks are kept for a run that is killed; None for one in the cache, named by the run's
            fingerprint.
        resume: take the blocks of an earlier run of the same model, config and data.
        device: that blocks are computed on, of :func:`hf_lowbit.calibration.placement.as_device`; None for where the
            model is.
        weights: of blocks on the meta device.
        complete: what holds the blocks of calibrated models, to be finished once their result is safe.
    """

    undo: bool = True
    folder: Path | None = None
    resume: bool = True
    device: torch.device | None = None
    weights: BlockWeights | None = None
    complete: list[Checkpoint] = field(default_factory=list)

    def finish(self) -> None:
        """Delete them: the whole result is there."""
        if rank() == 0:
            for checkpoint in self.complete:
                checkpoint.finish()
        self.complete.clear()

    def leave(self) -> None:
        """Keep them for another run."""
        for checkpoint in self.complete:
            checkpoint.leave()
        self.complete.clear()


@torch.no_grad()
def calibrate(model: nn.Module, config: LowbitConfig, recipe: Recipe, run: Run = Run()) -> None:
    """Quantize a float model in place with a calibrated method.

    Raises:
        PlanError, DataError, PlacementError, ResumeError: before any weight is changed.
        QuantizationError: a layer that could not be quantized.
    """
    plan = build_plan(model, config, model_facts(model, shared_weights(model)))
    for warning in plan.warnings:
        logger.warning(warning)
    was_training = model.training
    model.eval()
    try:
        _calibrate(model, config, recipe, run, plan)
    finally:
        model.train(was_training)


def _calibrate(model: nn.Module, config: LowbitConfig, recipe: Recipe, run: Run, plan: Plan) -> None:
    assert recipe.calibrate is not None
    started = time.monotonic()
    placement = Placement(model, plan.layers, run.device, run.weights)
    _check_placement(placement, config, recipe, run)
    data = _prepare(model, config)
    checkpoint = _checkpoint(model, config, data, run, placement)
    limit = default_limit()
    logger.info("%s", predict_peak(model, plan.layers, data.batches, recipe.targets, limit, placement))
    original_bits = 8 * next(p.element_size() for p in model.parameters() if p.is_floating_point())

    def pack(
        module: PackedModule, parameter: str, weight: Tensor, packed: PackedTensor, where: str, **repair: Any
    ) -> PackedParameter:
        return pack_parameter(module, parameter, weight, packed, where, config.adapter_rank(where), **repair)

    with ExitStack() as undo, TensorStore(limit, checkpoint.folder.parent) as store:
        undo.callback(checkpoint.leave)
        if run.undo:
            undo.callback(_snapshot(model, plan, placement))
        predictions = _predictions(model, config, data, store)
        if (notes := _prepare_model(model, config, recipe, data)) is not None:
            plan = _replan(model, config, notes, undo)
            placement = Placement(model, plan.layers, run.device, run.weights)
        original = None if recipe.refine is None else copy.deepcopy(model)
        walk = Walk(
            model, plan.layers, recipe.calibrate, data.batches, pack,
            targets=recipe.targets, checkpoint=checkpoint, seed=config.seed, limit=limit,
            folder=checkpoint.folder.parent, compensation=_compensation(config, plan),
            rounding=recipe.rounding if recipe.rounds_each else None, percentile=config.activation_percentile,
            fit_inputs=recipe.fit_inputs, original=original, placement=placement,
            mixed_precision=recipe.mixed_precision,
        )  # fmt: skip
        walked = walk.run()
        if recipe.refine is not None and original is not None:
            plan.warnings += _refine(model, original, recipe.refine, data)
            del original
        if predictions is not None:
            plan.warnings.append(_tune(model, config, predictions))
        config.provenance = {**config.provenance, **_provenance(data, config)}
        plan.warnings += [f"{name}: {why}" for name, why in walked.notes.items()]
        outcome = Outcome(
            {name: done.error for name, done in walked.parameters.items()},
            {name.rpartition(".")[0]: done.adapter for name, done in walked.parameters.items() if done.adapter},
            original_bits,
        )
        finish_quantization(model, config, plan, outcome, time.monotonic() - started)
        undo.pop_all()
    wait_for_all()
    run.complete.append(checkpoint)


def _check_placement(placement: Placement, config: LowbitConfig, recipe: Recipe, run: Run) -> None:
    """Refuse what needs more of the model at once than is where it is needed.

    What is done to the whole model before the first block (rotating it, choosing ranks) is done where it lies.
    """
    training = "tuning" if config.tuning is not None else "its last step" if recipe.refine is not None else None
    if placement.moves and training is not None:
        raise PlacementError(
            f"{training} trains the whole model at once, which does not come and go in blocks: move it to the device "
            "as a whole, and leave device and weights out"
        )
    budget = config.low_rank is not None and config.low_rank.budget_bits is not None
    whole = "low_rank.budget_bits" if budget else "its first step" if recipe.prepare is not None else None
    if run.weights is not None and (whole is not None or config.dataset == "self"):
        what = whole or "dataset='self'"
        raise PlacementError(f"{what} reads the whole model before its first block: give a model without meta tensors")


def _compensation(config: LowbitConfig, plan: Plan) -> Compensation:
    """What the walk needs to know of the config's low-rank part."""
    ranks = {name: layer.spec.low_rank or config.adapter_rank(name) for name, layer in plan.layers.items()}
    part = config.low_rank
    if part is None or part.keep == "fused":
        return Compensation(ranks)
    return Compensation(ranks, part.metric, part.iterations, transformed=part.keep == "branch")


def _prepare_model(model: nn.Module, config: LowbitConfig, recipe: Recipe, data: CalibrationData) -> list[str] | None:
    """What is done to the whole model, or chosen for it, before the walk: lines for the report, None for nothing."""
    notes = None if recipe.prepare is None else recipe.prepare(model, data.batches)
    if config.low_rank is not None and config.low_rank.budget_bits is not None:
        from hf_lowbit.search import choose_ranks  # the solver takes time to import

        notes = [*(notes or []), choose_ranks(model, config, data.batches)]
    return notes


def _replan(model: nn.Module, config: LowbitConfig, notes: list[str], undo: ExitStack) -> Plan:
    """The plan of a model that was rewritten: it may have been untied."""
    undo.callback(forget_ties(model))
    for note in notes:
        logger.info("%s", note)
    plan = build_plan(model, config, model_facts(model, shared_weights(model)))
    plan.warnings += notes
    return plan


def _predictions(
    model: nn.Module, config: LowbitConfig, data: CalibrationData, store: TensorStore
) -> Predictions | None:
    """Of the float model, where it is tuned on them in the end."""
    if config.tuning is None:
        return None
    return Predictions(model, ready(model, data.batches), store)


def _tune(model: nn.Module, config: LowbitConfig, predictions: Predictions) -> str:
    """Train scales and norms; a line for the report."""
    assert config.tuning is not None
    tuned = tune(model, predictions, **asdict(config.tuning), seed=config.seed)
    share = f"{len(tuned.layers)} of {len(packed_modules(model))} packed layers"  # other kinds keep their scales
    change = f"the loss on a part of the calibration data went from {tuned.before:.4g} to {tuned.after:.4g}"
    if not tuned.kept:
        return f"tuning scales and norms did not help and was undone: {change}"
    return f"scales of {share}, and norms, are tuned end to end: {change}; errors of single layers are those before"


def _refine(model: nn.Module, original: nn.Module, refine: Refine, data: CalibrationData) -> list[str]:
    """The method's last step, on batches as the model takes them; lines for the report."""
    notes = refine(original, model, ready(model, data.batches))
    for note in notes:
        logger.info("%s", note)
    return notes


def _prepare(model: nn.Module, config: LowbitConfig) -> CalibrationData:
    data = prepare_data(
        config.dataset, model, lambda: processing_of(model),
        num_samples=config.num_samples, sequence_length=config.sequence_length, seed=config.seed,
    )  # fmt: skip
    logger.info("calibrating on %s: %d batches, %d tokens", data.description, len(data.batches), data.tokens)
    if data.sample:
        logger.info("a sample of it: %r", data.sample)
    return data


def _checkpoint(
    model: nn.Module, config: LowbitConfig, data: CalibrationData, run: Run, placement: Placement
) -> Checkpoint:
    request = config.copy_with_data(None).to_dict()
    request.pop("provenance", None)  # where the model lies does not decide its bits
    facts = {
        "config": request,
        "data": data.fingerprint,
        "threads": torch.get_num_threads(),
        "device": _computer(placement.device),
        "precision": torch.get_float32_matmul_precision(),
        "weights": None if run.weights is None else run.weights.fingerprint,
        "processes": processes(),
        "versions": library_versions(),
    }
    fingerprint = fingerprint_of(model.state_dict().items(), facts)
    folder, lock = run.folder or cache_home().parent / "resume" / fingerprint[:24], None
    if run.folder is None and processes() == 1:
        folder, lock = unshared(folder)
    if rank() != 0:
        wait_for_all()  # the first process begins the folder, and it alone may discard one
    checkpoint = Checkpoint(folder, fingerprint, run.resume or rank() != 0, lock)
    if rank() == 0:
        wait_for_all()
    if checkpoint.finished:
        logger.info("%d finished blocks are taken from %s", checkpoint.finished, folder)
    else:
        logger.info("finished blocks are kept in %s until the run is complete", folder)
    return checkpoint


def _computer(device: torch.device) -> str:
    """What decides the bits of a product: not which of several equal cards it is."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _provenance(data: CalibrationData, config: LowbitConfig) -> dict[str, Any]:
    return {
        "data": data.description,
        "data_sha256": data.fingerprint,
        "num_samples": config.num_samples,
        **(data.facts or {"sequence_length": config.sequence_length}),
    }


def _snapshot(model: nn.Module, plan: Plan, placement: Placement) -> Callable[[], None]:
    """What puts a model back as it was: its layers, their parameters, and every float tensor in its own type."""
    originals = {name: model.get_submodule(name) for name in plan.layers}
    in_place = placement.device == placement.host  # then a block in float32 is worked on in place
    restore_tensors = remember(model, copied=torch.float32 if in_place else None)

    def restore() -> None:
        replace_modules(model, originals)
        restore_tensors()

    return restore


def calibrate_loaded(model: nn.Module, config: LowbitConfig, recipe: Recipe) -> None:
    """For from_pretrained: the float model is nobody's yet, so that nothing needs to be undone."""
    run = Run(undo=False)
    calibrate(model, config, recipe, run)
    run.finish()
