"""PackedMixer: a whole state-space mixer, with what it computes between its projections quantized or not."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lowbit.kernels import Operand, Scanned, causal_convolution
from hf_lowbit.kernels.operand import float_values
from hf_lowbit.nn.base import CorruptWeightError, PackedModule
from hf_lowbit.nn.linear import PackedLinear
from hf_lowbit.nn.remembered import Remembered
from hf_lowbit.nn.spec import LayerSpec
from hf_lowbit.nn.state_space.geometry import Geometry
from hf_lowbit.nn.state_space.names import GENERATIONS, MixerNames, mixer_refusal, names_of
from hf_lowbit.nn.state_space.prepared import Prepared
from hf_lowbit.nn.state_space.sites import Sites
from hf_lowbit.nn.state_space.spec import MixerSpec
from hf_lowbit.nn.state_space.states import States, check_state, keep_inputs, masked

Listener = Callable[[str, Tensor], None]
PEAK_TOKENS = 16  # of how many a listener gets the largest |h|


class PackedMixer(Sites, PackedModule):
    """A mixer of transformers with packed ``A_log`` and ``D``, its other parts children under their own names.

    The children are ordinary or packed layers; it calls the projections, and decodes the convolution, whose product is
    no matrix product. ``dt_bias``, and biases of layers, stay floats [ours for Mamba's dt bias and the convolution's:
    the papers' code rounds them to int8]. While ``A_log``, ``D`` or a child is still float it computes with that.

    Values between the projections are quantized at :meth:`sites` that have a scale. What a packed layer then reads is
    floats on the grid of the site: with the site's scale stored as its own it quantizes them to the same codes, and
    whatever wraps the layer, such as LoRA, reads what it multiplies.

    Attributes:
        generation: 1 (Mamba, arXiv 2312.00752) or 2 (Mamba-2, arXiv 2405.21060).
        geometry: its sizes.
        listener: called with every site's name and float values before they are quantized: ``[batch, T, channels]``,
            of B and C ``[batch, T, G, n]``; "state" with the largest ``|h|`` of every 16 tokens, ``[batch, k, channels,
            n]``. Neither saved nor copied.
    """

    packed_parameters = ("A_log", "D")
    generation: ClassVar[int]
    geometry: Geometry
    listener: Listener | None = None
    layer_idx: int
    conv1d: nn.Module
    in_proj: nn.Module
    out_proj: nn.Module

    def __init__(self, module: nn.Module, spec: LayerSpec) -> None:
        nn.Module.__init__(self)
        names = names_of(module)
        assert names is not None
        plain = {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}
        self.__dict__.update(plain)
        self.layer_spec, self.training = spec, module.training
        self._names: MixerNames = names
        self._float_class, self._plain = type(module), tuple(plain)
        self._remembered: Remembered[Prepared] = Remembered()
        self._parameters.update(module._parameters)
        _share_children(module, self)
        self.geometry = self._geometry(module)
        self._check_clusters()

    @classmethod
    def from_float(cls, module: nn.Module, spec: LayerSpec) -> PackedMixer:
        """From a mixer of :data:`hf_lowbit.nn.state_space.names.MIXERS`; its children become this one's.

        They are shared: a layer that is put in a child's place is in that place in both.

        Raises:
            TypeError: no such mixer, or one of the other generation.
            ValueError: clusters that the mixer has not enough heads or channels for.
        """
        names, name = names_of(module), type(module).__name__
        if names is None or (reason := mixer_refusal(module)) is not None:
            raise TypeError(f"a {name} is not a mixer that can be packed" if names is None else reason)
        if names.kind != cls.kind:
            raise TypeError(f"a {name} is of generation {GENERATIONS[names.kind]}, not {cls.generation}")
        return cls(module, spec)

    def to_float(self, dtype: torch.dtype) -> nn.Module:
        """The mixer of transformers with dequantized A_log and D, and the children as they are now."""
        module = self._float_class.__new__(self._float_class)
        nn.Module.__init__(module)
        module.__dict__.update({name: getattr(self, name) for name in self._plain})
        stored = {key for name in self.packed_parameters for key in self.companion_shapes(name)}
        module._parameters.update({k: p for k, p in self._parameters.items() if k not in stored})
        for name in self.packed_parameters:
            is_packed = self.is_packed(name)
            value = self.dequantized(name, dtype) if is_packed else self.get_parameter(name).detach().to(dtype)
            module.register_parameter(name, nn.Parameter(value))
        _share_children(self, module)
        return module

    @property
    def mixer_spec(self) -> MixerSpec:
        """How it computes between its projections."""
        return self.layer_spec.mixer or MixerSpec()

    def companion_shapes(self, name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """As of every packed module; those of the sites stand with A_log."""
        stored = super().companion_shapes(name)
        return stored | self.site_shapes() if name == "A_log" else stored

    def allocate(self, name: str, packed: bool) -> None:
        """As of every packed module; scales of sites only with the codes, since a site without one is float."""
        super().allocate(name, packed)
        for key in self.site_shapes() if name == "A_log" and not packed else ():
            self._parameters.pop(key)

    def decoded(self, name: str) -> Tensor:
        """``A_log`` or ``D`` as it is computed with, float32 in its original layout."""
        return self.dequantized(name) if self.is_packed(name) else self.get_parameter(name).float()

    def check(self) -> None:
        """Raise CorruptWeightError for stored tensors that contradict the specification or cannot be."""
        if problem := self.sites_problem():
            raise CorruptWeightError(problem)
        super().check()

    @abstractmethod
    def _geometry(self, module: Any) -> Geometry:
        """The sizes of a float mixer."""

    @abstractmethod
    def _prepare(self) -> Prepared:
        """All that the forward reads of parameters, decoded and expanded."""

    @abstractmethod
    def _sources(self) -> list[Tensor | None]:
        """All tensors that :meth:`_prepare` reads."""

    def _ready(self) -> Prepared:
        """:meth:`_prepare`, anew only where something changed; gradients and traced code need it anew."""
        sources = self._sources()
        learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in sources)
        if learns or torch.compiler.is_compiling():
            return self._prepare()
        return self._remembered.of("", sources, self._prepare)

    def _convolution(self) -> dict[str, Any]:
        """Weight ``[channels, taps]`` and bias of the convolution, float32."""
        child = self.get_submodule("conv1d")
        if not isinstance(child, nn.Conv1d):
            raise ValueError(
                f"layer {self.layer_idx}: its conv1d is wrapped in a {type(child).__name__}, whose own part is not "
                "computed: the mixer reads the convolution's weight; adapt in_proj instead"
            )
        layer: Any = child
        is_coded = isinstance(layer, PackedModule) and layer.is_packed()
        weight = layer.dequantized() if is_coded else layer.weight.float()
        return {"weight": weight.squeeze(1), "bias": None if layer.bias is None else layer.bias.float()}

    def _check_clusters(self) -> None:
        clusters, geometry = self.mixer_spec.clusters, self.geometry
        if self.mixer_spec.channel_states:
            raise ValueError("a scale for each channel of the state is of generation 1; generation 2 has clusters")
        if clusters is None:
            return
        limits = {"head_clusters": geometry.heads_per_group, "channel_clusters": geometry.head_dim}
        for (name, limit), count in zip(limits.items(), clusters, strict=True):
            if count > limit:
                what = "heads of a state group" if name == "head_clusters" else "channels of a head"
                raise ValueError(f"{name}={count} exceeds the {limit} {what}")

    def _observe(self, site: str, values: Tensor) -> None:
        if self.listener is not None:
            self.listener(site, values.detach())

    def _convolve(self, x: Tensor, ready: Prepared, cache: Any, states: States, mask: Tensor | None) -> Tensor:
        """Convolution and SiLU of ``[batch, T, channels]``: int8 codes where only codes are needed of it, or floats."""
        learns = torch.is_grad_enabled() and (x.requires_grad or ready.weight.requires_grad)
        out_scale = None if learns or self.listener is not None else ready.conv_out
        operand, context = Operand(x, ready.conv_in), states.convolution
        y = causal_convolution(
            operand, ready.weight, ready.bias, context, out_scale=out_scale, update=states.steps, backend=self.backend
        )
        if cache is not None and not states.steps:
            keep_inputs(cache, self.layer_idx, x, self.geometry.taps, ready.conv_in)
        return masked(y, mask)

    def _state_arguments(self, ready: Prepared, cache: Any, states: States) -> dict[str, Any]:
        """What a scan is told of the recurrent state."""
        peaks = PEAK_TOKENS if self.listener is not None and "state" in self.sites() else None
        return {
            "state": states.recurrent,
            "state_scale": ready.state_scale,
            "state_cluster": ready.state_cluster,
            "return_state": cache is not None and not states.in_place,
            "update": states.in_place,
            "peaks_every": peaks,
            "backend": self.backend,
        }

    def _keep_state(self, cache: Any, states: States, scanned: Scanned) -> None:
        """Put a scan's last state into the cache, unless it is there already."""
        if scanned.peaks is not None:
            self._observe("state", scanned.peaks)
        if cache is not None and not states.in_place and scanned.state is not None:
            state, heads = scanned.state.detach(), (self.geometry.heads, self.geometry.head_dim)
            state = state if self.generation == 1 else state.unflatten(1, heads)
            kept = cache.update_recurrent_state(state, self.layer_idx)
            check_state("recurrent", self.layer_idx, kept, state.dtype == torch.int8)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "listener"}


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument of transformers' mixers that changes what they compute and is not known here."""
    if arguments.get("seq_idx") is not None:
        raise ValueError("seq_idx: a packed mixer takes every row for one sequence; pad them instead")


def on_grid(operand: Operand, dtype: torch.dtype) -> Tensor:
    """An operand as the floats that a layer reads; gradients pass the rounding."""
    return operand.values if operand.scale is None else float_values(operand).to(dtype)


def without_bias(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer's product; its bias is added elsewhere. Hooks and adapters of the layer have their part in it."""
    bias: Any = layer.bias
    if bias is None:
        product: Tensor = layer(x)
        return product
    if not (layer._forward_pre_hooks or layer._forward_hooks or "forward" in layer.__dict__):
        if isinstance(layer, PackedLinear) and not layer.layer_spec.constant_token:
            return layer.unbiased(x)
        if type(layer) is nn.Linear:
            return F.linear(x, layer.weight)
    result: Tensor = layer(x) - bias
    return result


def quantizes_to(layer: nn.Module, scale: Tensor | None) -> bool:
    """Whether a layer rounds its inputs to the grid of this scale by itself, and nothing else reads them."""
    if scale is None or type(layer) is not PackedLinear or not layer.has_static_inputs:
        return False
    if torch.compiler.is_compiling():  # a graph does not depend on values: round twice, to the same codes
        return False
    spec, stored = layer.layer_spec, layer.input_scale()
    activation = spec.activation
    is_plain = spec.transform is None and spec.exact is None and not spec.low_rank and not spec.constant_token
    is_int8 = activation is not None and (activation.format, activation.bits, activation.symmetric) == ("int", 8, True)
    return is_plain and is_int8 and stored is not None and torch.equal(stored.flatten(), scale.flatten())


def _share_children(module: nn.Module, other: nn.Module) -> None:
    """Let two modules have the same children and buffers, now and later."""
    other._modules, other._buffers = module._modules, module._buffers
    other._non_persistent_buffers_set = module._non_persistent_buffers_set
