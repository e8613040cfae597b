"""The products of the fused LM head: the logits of chosen tokens, and the gradients of hidden states, weight and bias.

The logits of a chunk stand in a buffer that every chunk uses again, and their gradient is written over them.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from pmpo_kernels.contract import compute_dtype

ROW_MULTIPLE = 64  # elements: the buffer's rows begin at multiples of 128 bytes, whatever V is
BLOCK_BYTES = {"cpu": 2**22}
"""Size of temporaries that are made block by block: on a CPU what its caches hold; elsewhere 2^26, to need few launches."""
PRODUCT_BYTES = 2**26  # size, in the sum's dtype, of a block of a product that is rounded before it is added


class HeadOptions(NamedTuple):
    """How hidden states become logits, and which tokens and gradients are wanted. The logits are c tanh(s (W h + b) / c) with scale
    s and softcap c, or s (W h + b) without a softcap."""

    logit_scale: float
    logit_softcap: float | None
    temperature: float
    dtype: torch.dtype  # of the products
    gradients: list[bool]  # which of those of hidden, weight, bias are wanted
    max_chunk_tokens: int | None
    skip_zero_advantage: bool


def row_bytes(vocabulary: int, head: HeadOptions) -> int:
    """Bytes that a token takes in the buffers: its product with the head and, with a softcap, its logits beside that."""
    stride = -(-vocabulary // ROW_MULTIPLE) * ROW_MULTIPLE
    return stride * head.dtype.itemsize * (1 if head.logit_softcap is None else 2)


def gradient_dtypes(*leaves: Tensor | None) -> list[torch.dtype]:
    """Dtypes in which the gradients of these tensors are kept until the backward pass has scaled them. Each is the tensor's own,
    but float32 for float16, which could overflow, and for None."""
    return [torch.float32 if x is None or x.dtype == torch.float16 else x.dtype for x in leaves]


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, head: HeadOptions, dtypes: list[torch.dtype]
) -> list[Tensor]:
    """Uninitialised tensors for the gradients of hidden, weight and bias; without elements where a gradient is not wanted."""
    return [
        torch.empty(x.shape if wanted and x is not None else (0,), dtype=dtype, device=hidden.device)
        for x, dtype, wanted in zip((hidden, weight, bias), dtypes, head.gradients, strict=True)
    ]


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Write a b to `total` (float32) if this is the `first` product, else add it there. One product does it, with factors of 16
    bits and no rounding in between."""
    if first:
        torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)


@cache
def adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `add_product` works on this device with factors of this dtype, found by trying two small products. Versions of
    PyTorch differ: the operators came with 2.8, on CUDA devices, at first for a sum in 16 bits only."""
    a, b = (torch.ones(16, 16, dtype=dtype, device=device) for _ in range(2))
    total = torch.full((16, 16), torch.nan, dtype=torch.float32, device=device)
    try:
        for first in (True, False):
            add_product(total, a, b, first)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return bool((total == 32).all())


class Projection:
    """The logits of at most `size` tokens at a time, and the sums over all chunks of the gradients.

    hidden is (B, S, H), S >= T = `tokens_a_row`, for tokens (B, T), or (N, H); weight is (V, H), bias (V,). The gradients of weight
    and bias are summed in float32, or in float64 for float64 products. `once` promises that `back` is called at most once; the
    weight's gradient is then made in the weight's dtype, if the products have it.

    `temperature` is what `z`, the buffer's logits, are to be divided by. Without a softcap it includes the scale, which so costs
    nothing.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: HeadOptions,
        tokens_a_row: int,
        size: int,
        once: bool,
    ) -> None:
        self.hidden, self.head, self.T = hidden, head, max(tokens_a_row, 1)
        self.weight = weight.to(head.dtype)
        self.bias = None if bias is None else bias.to(head.dtype)
        self.cap = head.logit_softcap
        self.product = self._buffer(size, len(weight))
        self.z = self.product if self.cap is None else self._buffer(size, len(weight))
        self.temperature = head.temperature / head.logit_scale if self.cap is None else head.temperature
        self.kept = gradient_dtypes(hidden, weight, bias)
        summed = compute_dtype(head.dtype)
        of_weight = head.dtype if once and self.kept[1] == head.dtype else summed
        self.dhidden, self.dweight, self.dbias = empty_gradients(
            hidden, weight, bias, head, [self.kept[0], of_weight, summed]
        )
        for x in (self.dhidden, self.dbias):
            x.zero_()
        self.is_first = True  # the next product is the first of dweight: it is written there, not added

    def _buffer(self, size: int, V: int) -> Tensor:
        stride = -(-V // ROW_MULTIPLE) * ROW_MULTIPLE
        return self.hidden.new_empty(size, stride, dtype=self.head.dtype)[:, :V]

    def _at(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows,) if self.hidden.dim() == 2 else (rows // self.T, rows % self.T)

    def project(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states (M, H) in the products' dtype and logits z (M, V), in the buffer, of the tokens at flat positions
        `rows` (M,)."""
        h = self.hidden[self._at(rows)].to(self.head.dtype)
        product = self.product[: len(rows)]
        if self.bias is None:
            torch.mm(h, self.weight.t(), out=product)
        else:
            torch.addmm(self.bias, h, self.weight.t(), out=product)
        if self.cap is not None:
            for block in self._blocks(len(rows)):
                self.z[block] = self._tanh(product[block], self.cap).mul_(self.cap)
        return h, self.z[: len(rows)]

    def _tanh(self, product: Tensor, cap: float) -> Tensor:
        return product.to(compute_dtype(self.head.dtype), copy=True).mul_(self.head.logit_scale / cap).tanh_()

    def _blocks(self, rows: int) -> list[slice]:
        size = BLOCK_BYTES.get(self.z.device.type, 2**26)
        size = max(1, size // (self.z.stride(0) * compute_dtype(self.head.dtype).itemsize))
        return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]

    def move(self, target: Tensor, source: Tensor) -> None:
        """Copy rows `source` of the buffers to rows `target`. No row is both a source and a target."""
        for buffer in (self.z,) if self.cap is None else (self.z, self.product):
            for block in self._blocks(len(source)):
                buffer[target[block]] = buffer[source[block]]

    def float16_scale(self, coefficients: Tensor, h: Tensor) -> Tensor:
        """Return the power of two (0-d float64) to multiply a gradient of float16 logits by.

        It keeps the gradient from underflow and its products from overflow. The absolute values of a row of the gradient add up to
        at most twice its coefficient (M,), divided by the temperature and multiplied by the scale. With the power the largest entry
        is at most 1, and a product's sum at most 2^15, whether it runs over the tokens, with the largest |h|, or over the
        vocabulary, with the largest |weight|.
        """
        steepest = max(1.0, 1.0 if self.cap is None else self.head.logit_scale) / self.temperature
        most, total = (steepest * x for x in (coefficients.double().amax(), coefficients.double().sum()))
        sizes = [most, 2**-15 * total * h.abs().amax(), 2**-14 * most * self.weight.abs().amax()]
        return torch.exp2(-torch.stack(sizes).amax().log2().ceil().clamp(-120, 120))

    def back(self, rows: Tensor, h: Tensor, scale: Tensor | None) -> None:
        """Add what a chunk contributes to the gradients of hidden, weight and bias.

        The first rows of `z` hold the gradient of the logits of tokens `rows`, times `scale`, where None stands for 1. `h` (M, H)
        holds the hidden states of these tokens in the products' dtype, and is written over."""
        g = self.z[: len(rows)]
        if self.cap is not None:
            for block in self._blocks(len(rows)):  # the slope of c tanh(s x / c): s (1 - tanh^2)
                tanh = self._tanh(self.product[block], self.cap)
                g[block] = tanh.square_().neg_().add_(1).mul_(self.head.logit_scale).mul_(g[block])
        if self.head.gradients[2]:
            db = g.sum(0, dtype=self.dbias.dtype)
            self.dbias += db if scale is None else db / scale
        if self.head.gradients[1]:
            self._add_weight(g.t(), h, scale)
        if self.head.gradients[0]:
            dh = torch.mm(g, self.weight, out=h).to(self.dhidden.dtype)
            self.dhidden[self._at(rows)] = dh if scale is None else dh / scale

    def _add_weight(self, g: Tensor, h: Tensor, scale: Tensor | None) -> None:
        """Write g h / scale to dweight (V, H) if it is the first product, else add it there.

        Products of 16 bits are summed in float32: by the product itself where it can (`add_product`); elsewhere each is rounded
        once before it is added, block by block of the vocabulary."""
        total, first, self.is_first = self.dweight, self.is_first, False
        if total.dtype == g.dtype:
            torch.mm(g, h, out=total) if first else total.addmm_(g, h)
        elif scale is None and adds_to_float32(g.device, g.dtype):
            add_product(total, g, h, first)
        else:
            size = max(1, PRODUCT_BYTES // (h.shape[1] * total.element_size()))
            for start in range(0, len(total), size):
                block = torch.mm(g[start : start + size], h)
                block = block if scale is None else block.to(total.dtype) / scale
                part = total[start : start + size]
                part.copy_(block) if first else part.add_(block)

    def finish(self) -> list[Tensor]:
        """Return the gradients of hidden, weight and bias in `gradient_dtypes`. The buffers are freed before their conversion."""
        del self.z, self.product
        if self.is_first:
            self.dweight.zero_()
        return [x.to(d) for x, d in zip((self.dhidden, self.dweight, self.dbias), self.kept, strict=True)]
