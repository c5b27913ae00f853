"""PackedMamba2: mixers of the second generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.kernels import Operand, selective_scan
from hf_lowbit.nn.state_space.base import PackedMixer, check_arguments, on_grid
from hf_lowbit.nn.state_space.geometry import Geometry
from hf_lowbit.nn.state_space.prepared import Prepared
from hf_lowbit.nn.state_space.states import masked, read_states


class PackedMamba2(PackedMixer):
    """A mixer of Mamba-2 and kin: heads of P channels, in groups that share a B and a C.

    Sites, in the order of the forward: ``z``, ``conv_x``, ``conv_B``, ``conv_C``, ``dt`` (what in_proj returns), ``x``,
    ``B``, ``C`` (after convolution and SiLU), ``state``. One scale each, or of B and C one for each state group, and of
    x ``[G, m, c]`` and the state ``[G, m, c, n]`` one for each cluster of heads and channels (Quamba2, arXiv
    2503.22879).

    ``time_step_limit`` bounds the steps of a prefill and not those of single tokens, as in transformers.
    """

    kind = "mamba2"
    generation = 2
    dt_bias: Tensor
    norm: nn.Module
    time_step_limit: tuple[float, float]

    def _geometry(self, module: Any) -> Geometry:
        sizes = module.num_heads, module.head_dim, module.n_groups
        return Geometry(*sizes, module.ssm_state_size, module.conv_kernel_size)

    def matrix_shape(self, name: str) -> tuple[tuple[int, ...], int]:
        """((1,), H)."""
        return (1,), self.geometry.heads

    def to_matrix(self, name: str, weight: Tensor) -> Tensor:
        """As one row."""
        return weight.unsqueeze(0)

    def from_matrix(self, name: str, matrix: Tensor) -> Tensor:
        """Inverse of :meth:`to_matrix`."""
        return matrix.squeeze(0)

    def sites(self) -> dict[str, tuple[int, ...]]:
        """Site -> shape of its scale; empty for a mixer that computes in floats."""
        spec, geometry = self.mixer_spec, self.geometry
        if spec.activation_bits is None:
            return {}
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("z", "conv_x", "conv_B", "conv_C", "dt", "x", "B", "C"), (1,)
        )
        if spec.group_scales:
            shapes |= {"B": (geometry.groups,), "C": (geometry.groups,)}
        clusters = None if spec.clusters is None else (geometry.groups, *spec.clusters)
        if clusters is not None:
            shapes["x"] = clusters
        if spec.state_bits is not None:
            shapes["state"] = (1,) if clusters is None else (*clusters, geometry.state)
        return shapes

    def _sources(self) -> list[Tensor | None]:
        return [*self._parameters.values(), *self.conv1d._parameters.values()]

    def _prepare(self) -> Prepared:
        stored = self.site_scales()
        cluster, state = self.clusters_of_channels(), stored.pop("state", None)
        state_scale = None if state is None else state[:, None] if state.dim() == 1 else state.flatten(0, 2)
        scales = dict(stored)
        if self.mixer_spec.clusters is not None and "x" in scales:
            if cluster is None:
                raise ValueError("set_clusters comes before the scales of x are used")
            scales["x"] = scales["x"].flatten()[cluster]
        scales |= {site: scales[site][:, None] for site in ("B", "C") if site in scales and len(scales[site]) > 1}
        return Prepared(
            A=-torch.exp(self.decoded("A_log")),
            D=self.decoded("D"),
            dt_bias=self.dt_bias.float(),
            **self._convolution(),
            scales=scales,
            conv_in=self._of_channels(stored, ("conv_x", "conv_B", "conv_C")),
            conv_out=self._of_channels(stored | {"x": scales["x"]} if "x" in scales else stored, ("x", "B", "C")),
            state_scale=state_scale,
            state_cluster=None if cluster is None else cluster.to(torch.int32),
        )

    def _of_channels(self, scales: dict[str, Tensor], sites: tuple[str, str, str]) -> Tensor | None:
        """Scales of the convolution's channels, x, B and C side by side; None unless all are set."""
        if any(site not in scales for site in sites):
            return None
        width = self.geometry.groups * self.geometry.state
        widths = (self.geometry.intermediate, width, width)
        parts = (scales[site].repeat_interleave(w // len(scales[site])) for site, w in zip(sites, widths, strict=True))
        return torch.cat(list(parts))

    def forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """``[batch, T, hidden]`` to the same; the arguments are those of transformers' mixers.

        Raises:
            ValueError: the cache holds states of another model, or several sequences in a row (``seq_idx``).
        """
        check_arguments(kwargs)
        ready, dtype, tokens = self._ready(), hidden_states.dtype, hidden_states.shape[1]
        scales, geometry = ready.scales, self.geometry
        states = read_states(cache_params, self.layer_idx, tokens, geometry.taps, ready.coded)
        z, conv, dt = self._project(masked(hidden_states, attention_mask))
        values = self._convolve(conv, ready, cache_params, states, attention_mask)
        width = geometry.groups * geometry.state
        x, B, C = values.split([geometry.intermediate, width, width], -1)
        B, C = (each.unflatten(-1, (geometry.groups, geometry.state)) for each in (B, C))
        for site, each in (("x", x), ("B", B), ("C", C)):
            self._observe(site, each)
        gate, norm = Operand(z, scales.get("z")), self.norm
        gate_last = getattr(norm, "norm_before_gate", False)
        is_step = tokens == 1 and states.recurrent is not None
        lower, upper = (0.0, torch.inf) if is_step else self.time_step_limit
        scanned = selective_scan(
            Operand(x, scales.get("x")), Operand(dt, scales.get("dt")), ready.A,
            Operand(B, scales.get("B")), Operand(C, scales.get("C")), ready.D,
            z=None if gate_last else gate, dt_bias=ready.dt_bias,
            dt_limit=(lower, upper), dtype=torch.float32,
            **self._state_arguments(ready, cache_params, states),
        )  # fmt: skip
        self._keep_state(cache_params, states, scanned)
        y = scanned.output
        if not isinstance(norm, nn.Identity):  # the gate that comes before it is in the scan
            y = norm(y, on_grid(gate, torch.float32)) if gate_last else norm(y)
        output: Tensor = self.out_proj(y.to(dtype))
        return output

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What in_proj returns: the gate, the convolution's input and dt."""
        names, geometry = self._names, self.geometry
        if names.input_multiplier is not None:
            x = x * getattr(self, names.input_multiplier)
        projected = self.in_proj(x)
        if names.output_multiplier is not None:
            projected = projected * getattr(self, names.output_multiplier)
        width = geometry.groups * geometry.state
        z, conv, dt = projected.split([geometry.intermediate, geometry.intermediate + 2 * width, geometry.heads], -1)
        if self.listener is not None:
            parts = conv.split([geometry.intermediate, width, width], -1)
            for site, each in zip(("z", "conv_x", "conv_B", "conv_C", "dt"), (z, *parts, dt), strict=True):
                self._observe(site, each)
        return z, conv, dt
