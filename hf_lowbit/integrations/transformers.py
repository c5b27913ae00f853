"""The transformers adapter: one quantizer for every method.

On the fly, each float tensor of the checkpoint is quantized as it arrives, so that the float model is never whole in
memory. A quantized checkpoint needs no code of its own: the modules wait with tensors of the stored shapes.
"""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.config import LowbitConfig
from hf_lowbit.integrations.adapters import fold_compensation
from hf_lowbit.integrations.calibrating import calibrate_loaded, check_has_data
from hf_lowbit.integrations.compat import transformers as compat
from hf_lowbit.integrations.compensation import keeps_adapter, load_compensation
from hf_lowbit.integrations.finish import check_loaded, finish_quantization
from hf_lowbit.integrations.saving import attach_saving, detach_saving
from hf_lowbit.method import Recipe, method_of, methods
from hf_lowbit.nn import CorruptWeightError, PackedModule
from hf_lowbit.plan import ModelFacts, Plan, PlanError, build_plan, install, packed_modules, replace_module
from hf_lowbit.state import QuantizationState, attach_state, detach_state
from hf_lowbit.tensorwise import Outcome, QuantizationError, quantize_parameter

logger = logging.getLogger("hf_lowbit")

_COMPANIONS = (
    "", "_scale", "_scale_range", "_zero_point", "_zero_point_range", "_table", "_low_rank_a", "_low_rank_a_scale",
    "_low_rank_b", "_low_rank_b_scale", "_input_scale", "_input_shift",
)  # fmt: skip


class LowbitHfQuantizer(compat.HfQuantizer):
    """transformers' view of a :class:`LowbitConfig`."""

    quantization_config: LowbitConfig
    requires_calibration = False
    # transformers derives from this how per-expert tensors of a companion merge into the fused one, and split again.
    serialized_names = {  # noqa: RUF012
        "weight": [f"weight{suffix}" for suffix in _COMPANIONS]
    }

    def __init__(self, quantization_config: LowbitConfig, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)  # the user's config stays as it was
        self.plan = Plan({})
        self.outcome = Outcome()
        self.failures: list[str] = []
        self.recipe: Recipe | None = None
        self.checkpoint_folder: str | None = None
        self.started = time.monotonic()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot work, before any weight is read."""
        method = method_of(self.quantization_config)
        if not self.pre_quantized:
            check_has_data(method, self.quantization_config)
            if isinstance(device_map, dict) and "disk" in device_map.values():
                raise ValueError(
                    "hf_lowbit cannot quantize while part of the model is offloaded to disk: transformers would keep "
                    "float tensors there. Quantize without disk offload, save the result, and load that with offload"
                )
            self.recipe = method.make_recipe(self.quantization_config)

    @property
    def quantized_element_size(self) -> float:
        """Bytes per packed weight, scales included, for device_map="auto"."""
        spec = self.quantization_config.layer_spec("").weight
        per_scale = spec.group_size if isinstance(spec.group_size, int) else 1024
        return spec.bits / 8 + 4 / per_scale

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if checkpoint_files:
            self.checkpoint_folder = str(Path(checkpoint_files[0]).parent)
        if self.pre_quantized:
            names = [name for name, _ in model.named_modules()]
            self.plan = Plan.from_list(self._stored_plan(), names, compat.base_model_prefix(model))
        else:
            self.plan = build_plan(model, self.quantization_config, facts_of(model))
            self.quantization_config.plan = self.plan.to_list()
            for warning in self.plan.warnings:
                logger.warning(warning)
        if self._calibrates:
            return  # the float model is loaded first
        self._tie_companions(model)
        install(model, self.plan, packed=self.pre_quantized)
        for module in packed_modules(model).values():
            compat.mark_initialized(module)

    @property
    def _calibrates(self) -> bool:
        return self.recipe is not None and self.recipe.calibrate is not None

    def _stored_plan(self) -> list[dict[str, Any]]:
        if self.quantization_config.plan is None:
            raise PlanError("the checkpoint's quantization_config has no plan: hf_lowbit did not write it")
        return self.quantization_config.plan

    def _tie_companions(self, model: nn.Module) -> None:
        for target, source in compat.tied_weights(model).items():
            owner, _, parameter = target.rpartition(".")
            if owner in self.plan.layers and source.rpartition(".")[0] in self.plan.layers:
                for suffix in _COMPANIONS[1:]:
                    if f"{parameter}{suffix}" in self._stored_names(model, owner):
                        compat.tie_companions(model, f"{target}{suffix}", f"{source}{suffix}")

    def _stored_names(self, model: nn.Module, owner: str) -> set[str]:
        from hf_lowbit.nn import KINDS

        layer = self.plan.layers[owner]
        skeleton = KINDS[layer.kind].from_float(model.get_submodule(owner), layer.spec)
        return {key for parameter in skeleton.packed_parameters for key in skeleton.companion_shapes(parameter)}

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Also merge and split the companions of per-expert tensors; before 5.21 transformers does not by itself."""
        if not model:
            weight_conversions = compat.with_companions(weight_conversions, _COMPANIONS[1:])
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, *model)
        return conversions

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """True for float parameters that the plan packs."""
        if self.pre_quantized or self._calibrates:
            return False
        owner, _, parameter = param_name.rpartition(".")
        module = model.get_submodule(owner)
        return isinstance(module, PackedModule) and parameter in module.packed_parameters

    def get_quantize_ops(self) -> _QuantizeOnLoad:
        """The op that transformers runs on each such tensor."""
        return _QuantizeOnLoad(self)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.pre_quantized:
            self._refuse_missing(model)
            check_loaded(model, self.plan)
            attach_state(model, QuantizationState(self.quantization_config, source=compat.name_or_path(model)))
            if keeps_adapter(self.quantization_config):
                load_compensation(model, self.checkpoint_folder or compat.name_or_path(model))
        elif self.recipe is not None and self._calibrates:
            calibrate_loaded(model, self.quantization_config, self.recipe)
        else:
            if self.failures:
                raise QuantizationError("; ".join(self.failures))
            seconds = time.monotonic() - self.started
            finish_quantization(model, self.quantization_config, self.plan, self.outcome, seconds)
        attach_saving(model)
        return model

    def _refuse_missing(self, model: nn.Module) -> None:
        """transformers fills what a checkpoint lacks with whatever memory holds, and only warns."""
        missing = [
            f"{name}.{key}"
            for name, module in packed_modules(model).items()
            for key, parameter in module.named_parameters(recurse=False)
            if not compat.was_loaded(parameter)
        ]
        if missing:
            raise CorruptWeightError(
                f"the checkpoint lacks {len(missing)} tensors of packed layers: {', '.join(missing[:5])}; "
                "it is incomplete, or its config was edited"
            )

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        # transformers passes config.dtype, which is a string once the model has been saved
        dequantize_modules(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Always: the state dict is the disk layout."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Forward is plain torch."""
        return True


class _QuantizeOnLoad(compat.ConversionOps):
    """One float tensor in, codes and companions out."""

    def __init__(self, quantizer: LowbitHfQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: nn.Module | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """transformers swallows what an op raises, so failures are collected and raised after loading."""
        assert model is not None and self.quantizer.recipe is not None
        result: dict[str, Tensor] = {}
        for full_name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            owner, _, parameter = full_name.rpartition(".")
            module = model.get_submodule(owner)
            assert isinstance(module, PackedModule)
            config, recipe = self.quantizer.quantization_config, self.quantizer.recipe
            rank, iterations = config.adapter_rank(owner), 1 if config.low_rank is None else config.low_rank.iterations
            outcome = self.quantizer.outcome
            try:
                quantize_parameter(module, parameter, weight, recipe, owner, outcome, rank, iterations)
            except QuantizationError as error:
                self.quantizer.failures.append(str(error))
                result[full_name] = weight
                continue
            for key in module.companion_shapes(parameter):
                result[f"{owner}.{key}"] = getattr(module, key).data
        return result


def facts_of(model: nn.Module) -> ModelFacts:
    """What transformers knows of a model: its heads, tied weights and float32 modules."""
    heads = set()
    output = compat.output_embeddings(model)
    names = {id(module): name for name, module in model.named_modules()}
    if output is not None and id(output) in names:
        heads.add(names[id(output)])
    last = list(model.named_parameters())[-1][0].rpartition(".")[0]
    if last and "." not in last and isinstance(model.get_submodule(last), nn.Linear):
        heads.add(last)  # a classification head: the last layer, directly on the model
    groups: dict[str, set[str]] = {}
    for target, source in compat.tied_weights(model).items():
        owners = {target.rpartition(".")[0], source.rpartition(".")[0]}
        groups.setdefault(source, set()).update(owners)
    tied = tuple(frozenset(group) for group in groups.values() if len(group) > 1)
    return ModelFacts(frozenset(heads), tied, compat.keep_in_fp32(model))


def adopt(model: nn.Module, config: LowbitConfig) -> None:
    """Give a live model that was quantized in place what from_pretrained would have given it."""
    quantizer = LowbitHfQuantizer(config, pre_quantized=True)
    quantizer.quantization_config = config
    compat.mark_quantized(model, quantizer)


def dequantize_modules(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every packed module by its float original, in place, and forget that the model was quantized."""
    owners: dict[int, nn.Parameter] = {}
    for name, module in packed_modules(model).items():
        key = id(getattr(module, module.packed_parameters[0]))
        restored = module.to_float(dtype)
        restored.train(module.training)
        if key in owners:  # tied weights stay one tensor
            restored.weight = owners[key]
        elif module.packed_parameters == ("weight",):
            owners[key] = restored.weight  # type: ignore[assignment]
        replace_module(model, name, restored)
    fold_compensation(model)
    detach_saving(model)
    detach_state(model)


def register_all() -> None:
    """Make transformers know every method. Calling it twice is harmless."""
    for method in methods().values():
        name = str(method.config_class.quant_method)
        compat.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(name, method.config_class)
        compat.AUTO_QUANTIZER_MAPPING.setdefault(name, LowbitHfQuantizer)


register_all()
