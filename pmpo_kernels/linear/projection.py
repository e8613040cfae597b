"""The LM head on chosen tokens: their logits in one buffer that every chunk uses again, and the way back from its gradient."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from pmpo_kernels.contract import compute_dtype

ROW_MULTIPLE = 64  # elements: the buffer's rows begin at multiples of 128 bytes, whatever V is
BLOCK_BYTES = {"cpu": 2**22}
"""Of temporaries that are made block by block: on a CPU what its caches hold, elsewhere 2^26, beside which a launch is nothing."""
PRODUCT_BYTES = 2**26  # of a product that is rounded before it is added


class HeadOptions(NamedTuple):
    """How hidden states become logits, c tanh(s (W h + b) / c) with scale s and softcap c or s (W h + b) without one, and what is
    to be done with which of them."""

    logit_scale: float
    logit_softcap: float | None
    temperature: float
    dtype: torch.dtype  # of the products
    gradients: list[bool]  # which are wanted, of hidden, weight, bias
    max_chunk_tokens: int | None
    skip_zero_advantage: bool


def row_bytes(vocabulary: int, head: HeadOptions) -> int:
    """Bytes of a token in the buffers: the product, and with a softcap the logits beside it."""
    stride = -(-vocabulary // ROW_MULTIPLE) * ROW_MULTIPLE
    return stride * head.dtype.itemsize * (1 if head.logit_softcap is None else 2)


def gradient_dtypes(*leaves: Tensor | None) -> list[torch.dtype]:
    """Of their gradients until the backward pass has scaled them: the tensor's own, but float32 for float16."""
    return [torch.float32 if x is None or x.dtype == torch.float16 else x.dtype for x in leaves]


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, head: HeadOptions, dtypes: list[torch.dtype]
) -> list[Tensor]:
    """Room for the gradients of hidden, weight and bias; no element where none is wanted."""
    return [
        torch.empty(x.shape if wanted and x is not None else (0,), dtype=dtype, device=hidden.device)
        for x, dtype, wanted in zip((hidden, weight, bias), dtypes, head.gradients, strict=True)
    ]


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a b where it is the `first`, whatever stood there, else total += a b, of 16-bit factors in one product with a float32
    result."""
    if first:
        torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)


@cache
def adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `add_product` works here: asked of PyTorch by two small ones, because versions differ in what they accept (the
    operators came with 2.8, on CUDA devices, at first for a sum in 16 bits only)."""
    a, b = (torch.ones(16, 16, dtype=dtype, device=device) for _ in range(2))
    total = torch.full((16, 16), torch.nan, dtype=torch.float32, device=device)
    try:
        for first in (True, False):
            add_product(total, a, b, first)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return bool((total == 32).all())


class Projection:
    """Logits of at most `size` tokens at a time, and the sums of the gradients: of weight and bias in float32 at least, but where
    `once`, with `back` called once at most, in the weight's dtype if its product has that. hidden (B, S, H), S >= T, with tokens
    (B, T), or (N, H); weight (V, H).

    `temperature` is that of `z`, what the buffer holds: a scale without a softcap is part of it and costs nothing.
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
        self.is_first = True  # of the products in dweight, which it writes

    def _buffer(self, size: int, V: int) -> Tensor:
        stride = -(-V // ROW_MULTIPLE) * ROW_MULTIPLE
        return self.hidden.new_empty(size, stride, dtype=self.head.dtype)[:, :V]

    def _at(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows,) if self.hidden.dim() == 2 else (rows // self.T, rows % self.T)

    def project(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden states (M, H) in the products' dtype, logits z (M, V) in the buffer) of the tokens at flat positions `rows`."""
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
        """Copy rows `source` of the buffers to rows `target`, none of which is among them."""
        for buffer in (self.z,) if self.cap is None else (self.z, self.product):
            for block in self._blocks(len(source)):
                buffer[target[block]] = buffer[source[block]]

    def float16_scale(self, coefficients: Tensor, h: Tensor) -> Tensor:
        """The power of two (), float64, that a gradient of float16 logits is multiplied by, lest it underflow or a product
        overflow.

        The absolute values of a row add up to at most twice its coefficient (M,), over T and times s. The largest entry
        becomes 1 at most; what a product adds up 2^15 at most: over the tokens with the largest |h|, over the vocabulary with
        the largest |weight|.
        """
        steepest = max(1.0, 1.0 if self.cap is None else self.head.logit_scale) / self.temperature
        most, total = (steepest * x for x in (coefficients.double().amax(), coefficients.double().sum()))
        sizes = [most, 2**-15 * total * h.abs().amax(), 2**-14 * most * self.weight.abs().amax()]
        return torch.exp2(-torch.stack(sizes).amax().log2().ceil().clamp(-120, 120))

    def back(self, rows: Tensor, h: Tensor, scale: Tensor | None) -> None:
        """Add the products of the gradient that stands in the first rows of `z`, of tokens `rows` with hidden states `h`, which
        it writes over.

        `scale` is what that gradient was multiplied by, None for 1.
        """
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
        """dweight (V, H) = g h / scale, or after the first += it. 16-bit products are summed up in float32: by the product itself
        where it can, else each is rounded once, in blocks of the vocabulary."""
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
        """The gradients, in `gradient_dtypes`; the buffers are given back before."""
        del self.z, self.product
        if self.is_first:
            self.dweight.zero_()
        return [x.to(d) for x, d in zip((self.dhidden, self.dweight, self.dbias), self.kept, strict=True)]
