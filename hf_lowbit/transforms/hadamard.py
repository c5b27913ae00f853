"""Hadamard matrices, and products with them as a few small dense ones.

Paley's two constructions (J. Math. Phys. 12, 1933) over fields of q elements give the orders q + 1 for q = 3 mod 4 and
2 (q + 1) for q = 1 mod 4; Kronecker products with Sylvester's matrices of order 2 double them.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor

LARGEST_BASE = 512  # of Paley's matrices: they are multiplied densely
_WALSH = 64  # one dense product instead of six steps


@cache
def hadamard_base(order: int) -> int | None:
    """The smallest m <= 512 with a matrix of order m and order = m 2^k; None if there is none."""
    if order < 1:
        return None
    odd = order & -order  # the largest power of two
    sizes = [order // odd * 2**k for k in range(odd.bit_length())]
    return next((m for m in sizes if m <= LARGEST_BASE and _core(m) is not None), None)


def largest_hadamard(width: int) -> int:
    """The largest order that divides a width: its blocks cover it."""
    return next(order for order in range(width, 0, -1) if width % order == 0 and hadamard_base(order) is not None)


def hadamard_matrix(order: int) -> Tensor:
    """H ``[order, order]``, float64, entries +-1 / sqrt(order): H H^T = I.

    Raises:
        ValueError: no matrix of this order can be constructed.
    """
    return hadamard(torch.eye(order, dtype=torch.float64))


def hadamard(x: Tensor, order: int | None = None, inner: int = 1, inverse: bool = False) -> Tensor:
    """x (I kron H kron I_inner) of ``[..., channels]``, in at least float32; differentiable.

    Args:
        x: floating.
        order: of H; None: channels / inner, one block.
        inner: channels between two that are mixed: H mixes heads of ``inner`` channels.
        inverse: multiply by the transpose.

    Returns:
        x's shape and type, or float32 for half types: a sum over many channels needs it.

    Raises:
        ValueError: blocks of ``order * inner`` do not divide the channels, or no matrix of this order is known.
    """
    channels = x.shape[-1]
    order = channels // inner if order is None else order
    factors = _factors(order)
    if channels % (order * inner):
        raise ValueError(f"blocks of {order} x {inner} channels do not divide {channels}")
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    after = order * inner
    for core in factors:
        after //= len(core)
        matrix = core.to(y.device, y.dtype) / len(core) ** 0.5
        matrix = matrix.t() if inverse else matrix
        if after == 1:
            y = y.reshape(-1, len(core)) @ matrix
        elif y.numel() == len(core) * after:  # a single token
            y = matrix.t() @ y.reshape(len(core), after)
        else:
            lanes = y.reshape(-1, len(core), after).transpose(1, 2)  # one large product, not many small ones
            y = (lanes.reshape(-1, len(core)) @ matrix).reshape(lanes.shape).transpose(1, 2)
    return y.reshape(x.shape)


@cache
def _factors(order: int) -> tuple[Tensor, ...]:
    """Matrices of +-1 whose Kronecker product is that of the order."""
    base = hadamard_base(order)
    if base is None:
        raise ValueError(f"no Hadamard matrix of order {order} can be constructed")
    core = _core(base)
    assert core is not None
    factors, left = [core] if base > 1 else [], order // base
    while left > 1:
        factors.append(_walsh(min(left, _WALSH)))
        left //= len(factors[-1])
    return tuple(factors) or (core,)


def _walsh(order: int) -> Tensor:
    return torch.ones(1, 1) if order == 1 else torch.kron(_walsh(order // 2), torch.tensor([[1.0, 1.0], [1.0, -1.0]]))


@cache
def _core(order: int) -> Tensor | None:
    """Of order 1, or one of Paley's; float32."""
    if order == 1:
        return torch.ones(1, 1)
    if order % 4:
        return None
    if (order - 1) % 4 == 3 and (character := _jacobsthal(order - 1)) is not None:
        return torch.eye(order) + _bordered(character, -1.0)
    if order % 8 == 4 and (character := _jacobsthal(order // 2 - 1)) is not None:
        plus, zero = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(_bordered(character, 1.0), plus) + torch.kron(torch.eye(order // 2), zero)
    return None


def _bordered(core: Tensor, sign: float) -> Tensor:
    """[0, 1; sign, core]: a conference matrix."""
    size = len(core) + 1
    matrix = torch.zeros(size, size)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1.0, sign, core
    return matrix


def _jacobsthal(q: int) -> Tensor | None:
    """chi(a - b) over the field of q elements: 1 for squares, -1 for others, 0 for 0.

    None where q is no odd prime, nor the square or cube of one.
    """
    p = next((p for p in range(2, q + 1) if q % p == 0), 0)
    k = 1
    while p and p**k < q:
        k += 1
    if p < 3 or p**k != q or k > 3:
        return None
    elements = torch.tensor(list(product(range(p), repeat=k)))  # polynomials of degree < k, index in base p
    place = p ** torch.arange(k - 1, -1, -1)
    squares = (_squared(elements, _irreducible(p, k), p) * place).sum(1)
    chi = torch.full((q,), -1.0)
    chi[squares] = 1.0
    chi[0] = 0.0
    return chi[((elements[:, None] - elements[None]) % p * place).sum(2)]


def _squared(elements: Tensor, modulus: Tensor, p: int) -> Tensor:
    """Squares of polynomials ``[count, k]``, highest power first, modulo a monic one ``[k + 1]``."""
    k = elements.shape[1]
    full = torch.zeros(len(elements), 2 * k - 1, dtype=elements.dtype)
    for i in range(k):
        full[:, i : i + k] += elements[:, i : i + 1] * elements
    for i in range(k - 1):
        full[:, i : i + k + 1] -= full[:, i : i + 1] * modulus
    return full[:, k - 1 :] % p


def _irreducible(p: int, k: int) -> Tensor:
    """A monic polynomial of degree k <= 3 without a root, ``[k + 1]`` (of degree 1: x)."""
    points = torch.arange(p)
    for rest in product(range(p), repeat=k):
        values = torch.ones_like(points)
        for coefficient in rest:
            values = (values * points + coefficient) % p
        if k == 1 or bool(values.all()):
            return torch.tensor([1, *rest])
    raise AssertionError("there is one of every degree")
