"""One of two processes over gloo: `distributed_worker.py RANK WORLD STORE SCENARIO...`. Exits 1 with a traceback where one fails."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import take_part
from small_model import CONFIG, H, Model, batch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pmpo_kernels import LossConfig, linear_pmpo_loss, pmpo_loss, pmpo_loss_from_logp
from pmpo_kernels.verification import Case

WORLD = 2
AGGREGATIONS = ("seq-mean-token-mean", "token-mean")
SPLITS = {"uneven": (slice(0, 2), slice(2, 6)), "one rank masked": (slice(0, 5), slice(5, 6))}


class Policy(Model):
    """A model with the loss inside its forward pass, from logits or, if `fused`, from hidden states and the head's weight."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.double()

    def forward(self, case: Case, **options: object) -> Tensor:
        given = (case.token_ids, case.old_logp, case.advantages)
        options = {"mask": case.mask, "ref_logp": case.ref_logp, **options}
        h = self.hidden(case.token_ids.roll(1, 1))
        if self.fused:
            return linear_pmpo_loss(h, self.head.weight, *given, max_chunk_tokens=8, **options).loss
        return pmpo_loss(self.head(h), *given, **options).loss


class Backbone(Model):
    """A model that returns hidden states. The loss is computed outside."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.hidden(ids)


def whole_batch(split: str) -> Case:
    case = batch()
    case = case._replace(**{name: getattr(case, name).double() for name in ("old_logp", "ref_logp", "advantages")})
    if split == "one rank masked":
        case.mask[5] = False
    assert len({int(case.mask[part].sum()) for part in SPLITS[split]}) == WORLD  # uneven token counts
    return case


def part(case: Case, index: slice) -> Case:
    return Case(*(t[index] for t in case))


def denominator(mask: Tensor, aggregation: str) -> Tensor:
    """Return D as a user writes it. DDP and FSDP2 average over the ranks, so each takes the whole step's count over their
    number."""
    count = mask.sum() if aggregation == "token-mean" else mask.any(1).sum()
    dist.all_reduce(count)
    return count.clamp(min=1) / dist.get_world_size()


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def same(found: Tensor | None, want: Tensor | None) -> None:
    """Assert that two tensors are the same up to rounding. Both are float64, sums over at most 30 tokens and V = 24 entries, in
    another order, of terms that are at most some ten times the largest entry: below 10 x 100 eps = 2e-13 of it. Two steps of an
    optimizer add these up."""
    assert found is not None
    assert want is not None
    found = full(found)
    assert (found - want).abs().max() <= 1e-12 * want.abs().max(), (found - want).abs().max() / want.abs().max()


def train(model: nn.Module, steps: Callable[[], None]) -> list[Tensor]:
    """Return the gradients of the first step and the parameters after two. The optimizer is not Adam, which divides rounding errors
    by themselves."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found: list[Tensor] = []
    for _ in range(2):
        optimizer.zero_grad()
        steps()
        found = found or [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return found + list(model.parameters())


def one_process(fused: bool, case: Case, aggregation: str) -> list[Tensor]:
    model, config = Policy(fused), replace(CONFIG, loss_agg_mode=aggregation)
    return train(model, lambda: model(case, config=config).backward())


def compare(wrap: Callable[[Model], nn.Module], no_sync: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
    """Compare with one process for both losses, aggregations and splits, with the rank's batch in one piece or accumulated over
    two, the second without a trajectory where it has one."""
    for fused, split, aggregation in product((False, True), SPLITS, AGGREGATIONS):
        case, config = whole_batch(split), replace(CONFIG, loss_agg_mode=aggregation)
        want = one_process(fused, case, aggregation)
        mine = part(case, SPLITS[split][dist.get_rank()])

        def step(model: nn.Module, ends: tuple[int, ...], mine: Case = mine, config: LossConfig = config) -> None:
            D = denominator(mine.mask, config.loss_agg_mode)
            *first, last = [part(mine, slice(*piece)) for piece in pairwise(ends)]
            with no_sync(model):
                for piece in first:
                    model(piece, config=config, denominator=D).backward()
            model(last, config=config, denominator=D).backward()

        B = len(mine.advantages)
        for ends in ((0, B), (0, 1, B)):
            model = wrap(Policy(fused))
            for a, b in zip(train(model, partial(step, model, ends)), want, strict=True):
                same(a, b)
        if aggregation == "token-mean":  # what `same` must refuse: a rank's own count
            model = wrap(Policy(fused))
            model(mine, config=config).backward()
            assert (full(next(model.parameters()).grad) - want[0]).abs().max() > 1e-3 * want[0].abs().max()


def ddp() -> None:
    compare(DistributedDataParallel, lambda model: model.no_sync())


def ddp_outside() -> None:
    """Let the wrapped module return logits or hidden states, and the loss follow. DDP's hooks are on the parameters."""
    case = whole_batch("uneven")
    mine = part(case, SPLITS["uneven"][dist.get_rank()])
    D = denominator(mine.mask, "seq-mean-token-mean")
    options = {"mask": mine.mask, "ref_logp": mine.ref_logp, "config": CONFIG, "denominator": D}
    given, ids = (mine.token_ids, mine.old_logp, mine.advantages), mine.token_ids.roll(1, 1)
    logits, hidden = (DistributedDataParallel(kind().double()) for kind in (Model, Backbone))
    pmpo_loss(logits(ids), *given, **options).loss.backward()
    linear_pmpo_loss(hidden(ids), hidden.module.head.weight, *given, **options).loss.backward()
    for fused, model in ((False, logits), (True, hidden)):
        n = len(list(model.parameters()))
        for p, want in zip(model.parameters(), one_process(fused, case, CONFIG.loss_agg_mode)[:n], strict=True):
            same(p.grad, want)
    model = DistributedDataParallel(Backbone().double(), find_unused_parameters=True)
    with pytest.raises(RuntimeError, match=r"marked as ready twice|mark a variable ready only once"):
        linear_pmpo_loss(model(ids), model.module.head.weight, *given, **options).loss.backward()


def shard(model: Model, head: bool = False) -> Model:
    """Shard a model: the layer has a group of its own, on request the head too, and all else is the root's."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in (model.layer, model.head) if head else (model.layer,):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


@contextmanager
def without_gradient_sync(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def fsdp() -> None:
    compare(shard, without_gradient_sync)


def fsdp_head() -> None:
    """Give the head a group of its own. Called as a module it works; its weight alone is a DTensor and raises, unless unsharded."""
    case = whole_batch("uneven")
    mine = part(case, SPLITS["uneven"][dist.get_rank()])
    D = denominator(mine.mask, "seq-mean-token-mean")
    want = {fused: one_process(fused, case, "seq-mean-token-mean") for fused in (False, True)}

    model = shard(Policy(False), head=True)
    model(mine, config=CONFIG, denominator=D).backward()
    for p, gradient in zip(model.parameters(), want[False][:4], strict=True):
        same(p.grad, gradient)

    model = shard(Policy(True), head=True)
    with pytest.raises(TypeError, match=r"^weight: expected a plain tensor, got a DTensor; with FSDP2"):
        model(mine, config=CONFIG, denominator=D)

    model = shard(Policy(True), head=True)
    model.head.unshard()
    model(mine, config=CONFIG, denominator=D).backward()
    for p, gradient in zip(model.parameters(), want[True][:4], strict=True):
        same(p.grad, gradient)


def fsdp_outside() -> None:
    """Compute the loss after the root's forward pass, which leaves the root's group gathered."""
    case = whole_batch("uneven")
    mine = part(case, SPLITS["uneven"][dist.get_rank()])
    options = {"mask": mine.mask, "ref_logp": mine.ref_logp, "config": CONFIG}
    options["denominator"] = denominator(mine.mask, "seq-mean-token-mean")
    model = shard(Backbone().double())
    given = (mine.token_ids, mine.old_logp, mine.advantages)
    with pytest.raises(TypeError, match=r"^weight: expected a plain tensor, got a DTensor; with FSDP2"):
        linear_pmpo_loss(torch.randn(*mine.mask.shape, H).double(), model.head.weight, *given, **options)
    hidden = model(mine.token_ids.roll(1, 1))
    linear_pmpo_loss(hidden, model.head.weight, *given, **options).loss.backward()
    want = one_process(True, case, "seq-mean-token-mean")[:4]
    for p, gradient in zip(model.parameters(), want, strict=True):
        same(p.grad, gradient)

    # gathered by hand, the way back has to be told that the ranks' gradients differ
    model = shard(Backbone().double())
    hidden = model(mine.token_ids.roll(1, 1))
    model.reshard()
    weight = model.head.weight
    assert isinstance(weight, DTensor)
    gathered = (weight.full_tensor(grad_placements=[Partial("sum")]), weight.full_tensor())
    losses = [linear_pmpo_loss(hidden.detach(), w, *given, **options).loss for w in gathered]
    same(torch.autograd.grad(losses[0] / WORLD, weight)[0], want[-1])
    with pytest.raises(AssertionError):  # each shard has its own rank's gradient
        same(torch.autograd.grad(losses[1], weight)[0], want[-1])


def dtensors() -> None:
    """Pass any argument but logits (tests/ranks_worker.py) as a DTensor: it raises too, and says which."""
    case, mesh = whole_batch("uneven"), init_device_mesh("cpu", (WORLD,))
    given = (case.token_ids, case.old_logp, case.advantages)

    def sharded(x: Tensor) -> Tensor:
        return distribute_tensor(x, mesh, [Shard(0)])

    calls: dict[str, Callable[[], object]] = {
        "token_ids": lambda: pmpo_loss(case.logits, sharded(case.token_ids), *given[1:]),
        "logp": lambda: pmpo_loss_from_logp(sharded(case.old_logp), *given[1:]),
        "old_logp": lambda: pmpo_loss_from_logp(case.old_logp, sharded(case.old_logp), case.advantages),
        "advantages": lambda: pmpo_loss_from_logp(case.old_logp, case.old_logp, sharded(case.advantages)),
        "mask": lambda: pmpo_loss_from_logp(case.old_logp, *given[1:], mask=sharded(case.mask)),
        "hidden": lambda: linear_pmpo_loss(sharded(torch.randn(6, 5, H)), torch.randn(24, H), *given),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"^{name}: expected a plain tensor, got a DTensor"):
            call()


def docs() -> None:
    """Run the blocks of docs/pytorch.md for several processes, in order."""
    text = (Path(__file__).parent.parent / "docs" / "pytorch.md").read_text()
    first, *others = re.findall(r"```python\n(.*?)```", text, re.S)
    blocks = [first, *(block for block in others if "dist." in block)]
    assert len(blocks) == 3
    exec(compile("\n".join(blocks), "docs/pytorch.md", "exec"), {})


SCENARIOS = {f.__name__: f for f in (ddp, ddp_outside, fsdp, fsdp_head, fsdp_outside, dtensors, docs)}

if __name__ == "__main__":
    take_part(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], SCENARIOS, tuple(sys.argv[4:]), limit=80)
