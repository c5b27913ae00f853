"""Sites: where a mixer's values between its projections have stored scales."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from hf_lowbit.nn.inputs import is_scale
from hf_lowbit.nn.state_space.geometry import Geometry, channel_clusters, ends_problem
from hf_lowbit.nn.state_space.spec import MixerSpec

HEAD_ENDS, CHANNEL_ENDS = "head_ends", "channel_ends"


def site_key(site: str) -> str:
    """The parameter that holds a site's scale."""
    return f"site_{site}_scale"


class Sites(nn.Module):
    """Part of :class:`hf_lowbit.nn.PackedMixer`: what is stored of its sites.

    A scale is float32 as its int32 bit pattern, ``site_<name>_scale``; with clusters their ends stand beside as int32
    ``head_ends`` ``[G, m]`` and ``channel_ends`` ``[G, m, c]``. They appear as they are set; a site without a scale
    computes in floats.

    What is beyond a scale's range has the last code. NaN has none and is code 0, by every backend: a token whose
    hidden state is NaN keeps it in the residual stream, so that its own logits are NaN, while the states and later
    tokens see a token whose projections are zeros. Where floats are computed with, it spreads to all later tokens, as
    in transformers. Finite inputs and codes with finite scales make no NaN.
    """

    geometry: Geometry

    @property
    @abstractmethod
    def mixer_spec(self) -> MixerSpec:
        """How it computes between its projections."""

    @abstractmethod
    def sites(self) -> dict[str, tuple[int, ...]]:
        """Site -> shape of its scale; empty for a mixer that computes in floats."""

    def site_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Parameter -> (shape, dtype) of all that is stored for the sites."""
        stored = {site_key(site): (shape, torch.int32) for site, shape in self.sites().items()}
        if self.mixer_spec.clusters is not None:
            heads, channels = self.mixer_spec.clusters
            stored[HEAD_ENDS] = (self.geometry.groups, heads), torch.int32
            stored[CHANNEL_ENDS] = (self.geometry.groups, heads, channels), torch.int32
        return stored

    def site_scale(self, site: str) -> Tensor | None:
        """The stored scale of a site, float32 of the shape in :meth:`sites`; None until it is set."""
        stored = self._parameters.get(site_key(site))
        return None if stored is None else stored.view(torch.float32)

    def site_scales(self) -> dict[str, Tensor]:
        """Site -> its scale, of the sites that have one."""
        found = {site: self.site_scale(site) for site in self.sites()}
        return {site: scale for site, scale in found.items() if scale is not None}

    @torch.no_grad()
    def set_site_scale(self, site: str, scale: Tensor) -> None:
        """Quantize the values at a site from now on.

        Raises:
            ValueError: no such site, another shape, or a scale that is not finite and positive.
        """
        shape = self.sites().get(site)
        if shape is None:
            known = ", ".join(self.sites()) or "none, as it computes in floats"
            raise ValueError(f"this mixer has no site {site!r}; it has {known}")
        if tuple(scale.shape) != shape:
            raise ValueError(f"the scale of {site!r} is {list(shape)}, not {list(scale.shape)}")
        if not is_scale(scale):
            raise ValueError(f"the scale of {site!r} must be finite and positive, not {scale.tolist()}")
        self._store(site_key(site), scale.detach().to(torch.float32).clone().view(torch.int32))

    @torch.no_grad()
    def set_clusters(self, head_ends: Tensor, channel_ends: Tensor) -> None:
        """Store where the clusters end: integers ``[G, m]`` and ``[G, m, c]``; the last are heads per group, and P.

        Raises:
            ValueError: a mixer without clusters, other shapes, or ends that do not ascend to the last.
        """
        given = {HEAD_ENDS: head_ends, CHANNEL_ENDS: channel_ends}
        shapes = self.site_shapes()
        for key, ends in given.items():
            if key not in shapes:
                raise ValueError("this mixer has no clusters (MixerSpec.head_clusters)")
            if tuple(ends.shape) != shapes[key][0]:
                raise ValueError(f"{key} is {list(shapes[key][0])}, not {list(ends.shape)}")
            if problem := ends_problem(ends, self._last_end(key)):
                raise ValueError(f"{key} {problem}")
        for key, ends in given.items():
            self._store(key, ends.detach().to(torch.int32).clone())

    def clusters_of_channels(self) -> Tensor | None:
        """The cluster of each channel, int64 ``[H * P]``; None without clusters, or until they are set."""
        ends = self._parameters.get(HEAD_ENDS), self._parameters.get(CHANNEL_ENDS)
        if ends[0] is None or ends[1] is None:
            return None
        return channel_clusters(ends[0], ends[1], self.geometry)

    def sites_problem(self) -> str | None:
        """What is wrong with what is stored for the sites, if anything is."""
        for key, (shape, dtype) in self.site_shapes().items():
            stored = self._parameters.get(key)
            if stored is None:
                return f"{key} is missing"
            if (tuple(stored.shape), stored.dtype) != (shape, dtype):
                return f"{key} is {tuple(stored.shape)} {stored.dtype}, but the plan says {shape} {dtype}"
            if stored.device.type == "meta":
                continue
            if key in (HEAD_ENDS, CHANNEL_ENDS):
                if problem := ends_problem(stored, self._last_end(key)):
                    return f"{key} {problem}"
            elif not is_scale(stored.view(torch.float32)):
                return f"{key} holds values that are not finite and positive"
        return None

    def _last_end(self, key: str) -> int:
        return self.geometry.heads_per_group if key == HEAD_ENDS else self.geometry.head_dim

    def _store(self, key: str, tensor: Tensor) -> None:
        device = self.get_parameter("A_log").device
        setattr(self, key, nn.Parameter(tensor.to(device), requires_grad=False))
