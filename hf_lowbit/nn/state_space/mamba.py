"""PackedMamba: mixers of the first generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.kernels import Operand, selective_scan
from hf_lowbit.nn.state_space.base import PackedMixer, check_arguments, on_grid, quantizes_to, without_bias
from hf_lowbit.nn.state_space.geometry import Geometry
from hf_lowbit.nn.state_space.prepared import Prepared
from hf_lowbit.nn.state_space.states import masked, read_states


class PackedMamba(PackedMixer):
    """A mixer of Mamba and kin: every channel is a head, and dt, B and C are projections of x.

    Sites, in the order of the forward: ``in`` (what in_proj returns: the convolution's input and the gate z), ``x``
    (after convolution and SiLU: what x_proj and the scan read), ``x_proj`` (dt, B and C together), ``dt`` (what dt_proj
    returns, without its bias), ``state``. Where norms lie between x_proj and dt, B and C: ``dt_in``, ``B`` and ``C``
    instead of ``x_proj``. One scale each (Quamba, arXiv 2410.13229).

    Unlike transformers' a prefill continues the recurrent state that the cache holds.
    """

    kind = "mamba"
    generation = 1
    x_proj: nn.Module
    dt_proj: nn.Linear

    def _geometry(self, module: Any) -> Geometry:
        return Geometry(module.intermediate_size, 1, 1, module.ssm_state_size, module.conv_kernel_size)

    def matrix_shape(self, name: str) -> tuple[tuple[int, ...], int]:
        """((e,), n) of A_log, ((1,), e) of D."""
        return ((self.geometry.heads,), self.geometry.state) if name == "A_log" else ((1,), self.geometry.heads)

    def to_matrix(self, name: str, weight: Tensor) -> Tensor:
        """``D`` as one row."""
        return weight if name == "A_log" else weight.unsqueeze(0)

    def from_matrix(self, name: str, matrix: Tensor) -> Tensor:
        """Inverse of :meth:`to_matrix`."""
        return matrix if name == "A_log" else matrix.squeeze(0)

    def sites(self) -> dict[str, tuple[int, ...]]:
        """Site -> (1,), of a state with a scale for each channel (e,); empty for a mixer that computes in floats."""
        if self.mixer_spec.activation_bits is None:
            return {}
        read = ("x_proj",) if self._names.norms is None else ("dt_in", "B", "C")
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("in", "x", *read, "dt"), (1,))
        if self.mixer_spec.state_bits is not None:
            shapes["state"] = (self.geometry.heads,) if self.mixer_spec.channel_states else (1,)
        return shapes

    def _check_clusters(self) -> None:
        if self.mixer_spec.clusters is not None or self.mixer_spec.group_scales:
            raise ValueError(
                "a mixer of generation 1 has one state group and no heads: neither clusters nor group scales"
            )

    def _sources(self) -> list[Tensor | None]:
        conv1d, dt_proj = self.conv1d, self.dt_proj
        return [*self._parameters.values(), *conv1d._parameters.values(), *dt_proj._parameters.values(), dt_proj.bias]

    def _prepare(self) -> Prepared:
        scales = self.site_scales()
        state, dt_proj = scales.get("state"), self.dt_proj
        each = None if state is None else torch.arange(len(state), dtype=torch.int32, device=state.device)
        return Prepared(
            A=-torch.exp(self.decoded("A_log")),
            D=self.decoded("D"),
            dt_bias=None if dt_proj.bias is None else dt_proj.bias.float(),
            **self._convolution(),
            scales=scales,
            conv_in=scales.get("in"),
            conv_out=scales.get("x"),
            state_scale=None if state is None else state[:, None],
            state_cluster=None if each is None or len(each) == 1 else each,
            reads_dt=quantizes_to(dt_proj, scales.get("x_proj", scales.get("dt_in"))),
        )

    def forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """``[batch, T, hidden]`` to the same; the arguments are those of transformers' mixers.

        Raises:
            ValueError: the cache holds states of another model, or several sequences in a row (``seq_idx``).
        """
        check_arguments(kwargs)
        ready, dtype = self._ready(), hidden_states.dtype
        scales = ready.scales
        states = read_states(cache_params, self.layer_idx, hidden_states.shape[1], self.geometry.taps, ready.coded)
        xz = self.in_proj(masked(hidden_states, attention_mask))
        self._observe("in", xz)
        x, z = xz.chunk(2, -1)
        values = self._convolve(x, ready, cache_params, states, attention_mask)
        self._observe("x", values)
        read = Operand(values, scales.get("x"))
        dt, B, C = self._read(on_grid(read, dtype), ready)
        scanned = selective_scan(
            read, dt, ready.A, B, C, ready.D,
            z=Operand(z, scales.get("in")), dt_bias=ready.dt_bias, dtype=dtype,
            **self._state_arguments(ready, cache_params, states),
        )  # fmt: skip
        self._keep_state(cache_params, states, scanned)
        y: Tensor = self.out_proj(scanned.output)
        return y

    def _read(self, x: Tensor, ready: Prepared) -> tuple[Operand, Operand, Operand]:
        """dt without its bias ``[batch, T, e]``, B and C ``[batch, T, 1, n]``, of x ``[batch, T, e]``."""
        both, n = self.x_proj(x), self.geometry.state
        parts = both.split([both.shape[-1] - 2 * n, n, n], -1)
        if self._names.norms is None:
            self._observe("x_proj", both)
            sites = ["x_proj"] * 3
        else:
            parts = [self.get_submodule(norm)(part) for norm, part in zip(self._names.norms, parts, strict=True)]
            sites = ["dt_in", "B", "C"]
        read, B, C = (Operand(part, ready.scales.get(site)) for part, site in zip(parts, sites, strict=True))
        B, C = (each._replace(values=each.values.unsqueeze(2)) for each in (B, C))
        for site, operand in zip(sites, (read, B, C), strict=True) if self._names.norms is not None else ():
            self._observe(site, operand.values)
        dt = without_bias(self.dt_proj, read.values if ready.reads_dt else on_grid(read, x.dtype))
        self._observe("dt", dt)
        return Operand(dt, ready.scales.get("dt")), B, C
