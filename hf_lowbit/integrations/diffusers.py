"""The diffusers adapter: one quantizer for every method, as in the transformers adapter."""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import CustomDtype
from torch import Tensor, nn

from hf_lowbit.config import LowbitConfig
from hf_lowbit.integrations.calibrating import calibrate_loaded, check_has_data
from hf_lowbit.integrations.compat import diffusers as compat
from hf_lowbit.integrations.compensation import keeps_adapter, load_compensation
from hf_lowbit.integrations.finish import check_loaded, finish_quantization
from hf_lowbit.integrations.saving import attach_saving
from hf_lowbit.method import Recipe, method_of, methods
from hf_lowbit.nn import CorruptWeightError, PackedModule
from hf_lowbit.plan import ModelFacts, Plan, PlanError, build_plan, install, packed_modules
from hf_lowbit.state import QuantizationState, attach_state
from hf_lowbit.tensorwise import Outcome, QuantizationError, quantize_parameter

logger = logging.getLogger("hf_lowbit")


class LowbitDiffusersQuantizer(compat.DiffusersQuantizer):
    """diffusers' view of a :class:`LowbitConfig`."""

    quantization_config: LowbitConfig  # type: ignore[assignment]
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: LowbitConfig, **kwargs: Any) -> None:
        kwargs.setdefault("pre_quantized", quantization_config.plan is not None)  # from_single_file does not say
        config: Any = copy.deepcopy(quantization_config)  # the user's config stays as it was
        super().__init__(config, **kwargs)
        self.plan = Plan({})
        self.outcome = Outcome()
        self.recipe: Recipe | None = None
        self.checkpoint_keys: frozenset[str] = frozenset()
        self.source: str | None = None
        self.offloads = False
        self.started = time.monotonic()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot work, before any weight is read."""
        self.offloads = isinstance(device_map, dict) and "disk" in device_map.values()
        if self.pre_quantized:
            return
        if self.offloads:
            raise ValueError(
                "hf_lowbit cannot quantize while part of the model is offloaded to disk: diffusers would keep the "
                "float tensors there. Quantize without disk offload, save the result, and load that with offload"
            )
        method = method_of(self.quantization_config)
        check_has_data(method, self.quantization_config)
        self.recipe = method.make_recipe(self.quantization_config)

    @property
    def _calibrates(self) -> bool:
        return self.recipe is not None and self.recipe.calibrate is not None

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remember which tensors the checkpoint has, and where it is."""
        self.checkpoint_keys = frozenset(loaded_keys)
        self.source = str(Path(checkpoint_files[0]).parent)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized:
            self.plan = Plan.from_list(self._stored_plan(), [name for name, _ in model.named_modules()])
        else:
            self.plan = build_plan(model, self.quantization_config, facts_of(model))
            self.quantization_config.plan = self.plan.to_list()
            for warning in self.plan.warnings:
                logger.warning(warning)
        if not self._calibrates:  # else the float model is loaded first
            install(model, self.plan, packed=self.pre_quantized)
        if self.pre_quantized and self.checkpoint_keys:
            _require(sorted(_stored_names(model) - self.checkpoint_keys))
        compat.store_config(model, self.quantization_config)

    def _stored_plan(self) -> list[dict[str, Any]]:
        if self.quantization_config.plan is None:
            raise PlanError(
                "the checkpoint's quantization_config has no plan: it was not written by hf_lowbit, or edited"
            )
        return self.quantization_config.plan

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """On the fly, companions are made, not loaded."""
        if self.pre_quantized:
            return missing_keys
        made = _stored_names(model) - _packed_names(model)
        return [key for key in missing_keys if key not in made]

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """True for float parameters that the plan packs.

        Raises:
            CorruptWeightError: a stored tensor that contradicts the plan.
        """
        owner, _, key = param_name.rpartition(".")
        module = model.get_submodule(owner)
        if not isinstance(module, PackedModule):
            return False
        if self.pre_quantized:
            stored = state_dict.get(param_name, param_value)  # diffusers may have cast param_value
            _refuse_contradiction(module, param_name, key, stored)
            return False
        return key in module.packed_parameters

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Quantize one float tensor of the checkpoint, in its place.

        Raises:
            QuantizationError: naming the layer.
        """
        assert self.recipe is not None
        owner, _, parameter = param_name.rpartition(".")
        module = model.get_submodule(owner)
        assert isinstance(module, PackedModule)
        stored = state_dict.get(param_name, param_value)  # diffusers may have cast param_value
        if not stored.is_floating_point():
            raise QuantizationError(
                f"{param_name} is stored as {stored.dtype}: it is quantized already, by something else"
            )
        config, weight = self.quantization_config, param_value.to(target_device)
        iterations = 1 if config.low_rank is None else config.low_rank.iterations
        rank = config.adapter_rank(owner)
        quantize_parameter(module, parameter, weight, self.recipe, owner, self.outcome, rank, iterations)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.pre_quantized:
            stored = model.state_dict()
            _require([] if self.offloads else sorted(name for name in _stored_names(model) if stored[name].is_meta))
            check_loaded(model, self.plan)
            attach_state(model, QuantizationState(self.quantization_config, source=self.source))
            if keeps_adapter(self.quantization_config):
                load_compensation(model, self.source)
        elif self.recipe is not None and self._calibrates:
            calibrate_loaded(model, self.quantization_config, self.recipe)
        else:
            self._refuse_withheld(model)
            finish_quantization(
                model, self.quantization_config, self.plan, self.outcome, time.monotonic() - self.started
            )
        attach_saving(model)
        return model

    def _refuse_withheld(self, model: nn.Module) -> None:
        floats = [name for name in sorted(_packed_names(model)) if name not in self.outcome.errors]
        withheld = [name for name in floats if name in self.checkpoint_keys]
        if withheld:
            raise QuantizationError(
                f"diffusers kept {len(withheld)} weights of the checkpoint from being quantized "
                f"({', '.join(withheld[:5])}): load without offload_state_dict and ignore_mismatched_sizes"
            )

    def _dequantize(self, model: nn.Module) -> nn.Module:
        from hf_lowbit.integrations.transformers import dequantize_modules

        dtype: Any = model.dtype
        dequantize_modules(model, dtype if dtype.is_floating_point else torch.float32)
        compat.forget_quantized(model)
        return model

    def adjust_target_dtype(self, torch_dtype: Any) -> Any:
        """Width of a packed weight, for device_map="auto"; stored codes are counted as they are."""
        if self.pre_quantized or self._calibrates:
            return torch_dtype
        return CustomDtype.INT4 if self.quantization_config.layer_spec("").weight.bits <= 4 else torch.int8

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype | None) -> dict[str, torch.dtype]:
        """Width of what stays in full precision, for device_map="auto"."""
        packed = _packed_names(model)
        floats = [name for name, value in model.named_parameters() if value.is_floating_point() and name not in packed]
        return dict.fromkeys(floats, torch_dtype or torch.float32)

    @property
    def supports_parallel_loading(self) -> bool:
        """On the fly, one tensor after the other, so that the float model is never whole in memory."""
        return bool(self.pre_quantized)

    @property
    def is_serializable(self) -> bool:
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


def facts_of(model: nn.Module) -> ModelFacts:
    """What diffusers knows of a model: its float32 modules. It ties no weights, and has no output heads."""
    return ModelFacts(full_precision=compat.keep_in_fp32(model))


def adopt(model: nn.Module, config: LowbitConfig) -> None:
    """Give a live model that was quantized in place what from_pretrained would have given it."""
    quantizer = LowbitDiffusersQuantizer(config, pre_quantized=True)
    quantizer.quantization_config = config
    compat.mark_quantized(model, quantizer)


def register_all() -> None:
    """Make diffusers know every method. Calling it twice is harmless."""
    for method in methods().values():
        name = str(method.config_class.quant_method)
        compat.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(name, method.config_class)
        compat.AUTO_QUANTIZER_MAPPING.setdefault(name, LowbitDiffusersQuantizer)


def _packed_names(model: nn.Module) -> set[str]:
    """Full names of the parameters that are, or will be, codes."""
    return {f"{name}.{key}" for name, module in packed_modules(model).items() for key in module.packed_parameters}


def _stored_names(model: nn.Module) -> set[str]:
    """Full names of the codes and their companions."""
    return {
        f"{name}.{key}"
        for name, module in packed_modules(model).items()
        for parameter in module.packed_parameters
        for key in module.companion_shapes(parameter)
    }


def _require(missing: list[str]) -> None:
    if missing:
        raise CorruptWeightError(
            f"{len(missing)} tensors of the plan were not loaded from the checkpoint ({', '.join(missing[:5])}): it is "
            "incomplete, its config was edited, or it was loaded with offload_state_dict or ignore_mismatched_sizes"
        )


def _refuse_contradiction(module: PackedModule, full_name: str, key: str, stored: Tensor) -> None:
    for parameter in module.packed_parameters:
        expected = module.companion_shapes(parameter).get(key)
        if expected is not None and expected != (tuple(stored.shape), stored.dtype):
            raise CorruptWeightError(
                f"{full_name} is {tuple(stored.shape)} {stored.dtype} in the checkpoint, but the plan says "
                f"{expected[0]} {expected[1]}; the checkpoint is damaged or its config was edited"
            )
