"""The rules of optim/update_rules.py as Triton functions, which finish_kernel calls, and rounding by chance."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sgd_rule(g, w, place, mask, numbers, state, corrections, seed, STOCHASTIC: tl.constexpr):
    lr, factor, decay, nesterov = numbers
    g += decay * w
    if len(state) > 0:
        buffer = factor * tl.load(state[0] + place, mask=mask, other=0.0).to(tl.float32) + g
        store_rounded(state[0] + place, buffer, place, mask, seed + 1, STOCHASTIC)
        g = tl.where(nesterov != 0.0, g + factor * buffer, buffer)
    return w - lr * g


@triton.jit
def adamw_rule(g, w, place, mask, numbers, state, corrections, seed, STOCHASTIC: tl.constexpr):
    lr, beta1, beta2, eps, decay = numbers
    size, root = corrections
    w *= 1.0 - lr * decay
    first = tl.load(state[0] + place, mask=mask, other=0.0).to(tl.float32)
    first += (1.0 - beta1) * (g - first)
    second = beta2 * tl.load(state[1] + place, mask=mask, other=0.0).to(tl.float32) + (1.0 - beta2) * g * g
    store_rounded(state[0] + place, first, place, mask, seed + 1, STOCHASTIC)
    store_rounded(state[1] + place, second, place, mask, seed + 2, STOCHASTIC)
    return w - size[:, None] * first / (tl.sqrt(second) / root[:, None] + eps)


TRITON_RULES = {"sgd": sgd_rule, "adamw": adamw_rule}


@triton.jit
def store_rounded(pointer, value, place, mask, seed, STOCHASTIC: tl.constexpr):
    """Store float32 as the pointer's dtype, bfloat16 by chance if STOCHASTIC."""
    if STOCHASTIC and pointer.dtype.element_ty == tl.bfloat16:
        noise = random_bits(place, seed) & 65535
        rounded = ((value.to(tl.int32, bitcast=True) + noise) & -65536).to(tl.float32, bitcast=True)
        value = tl.where(tl.abs(rounded) < float("inf"), rounded, value)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def random_bits(place, seed):
    """32 bits by a hash of where a number is stored: rounding by chance needs no more, and Philox fills the registers.

    The hash is lowbias32 of C. Wellons' "hash-prospector", whose bias is below 0.2 in a million.
    """
    low, high = place.to(tl.uint32), (place >> 32).to(tl.uint32)
    bits = (low ^ (high * 0x9E3779B9)) + seed.to(tl.uint32) * 0x85EBCA6B
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return (bits ^ (bits >> 16)).to(tl.int32, bitcast=True)
