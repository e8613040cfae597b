"""One run of the experiment: a method, a seed, a staleness."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from logs import LossName, Row, Settings, finished, write_log
from methods import Method
from policy import Policy, Rollouts, load_policy, sample
from tasks import Problem, draw_problems, reward
from torch import Tensor

from pmpo_kernels import LossConfig, PMPOOutput, linear_pmpo_loss, pmpo_loss, token_logp
from pmpo_kernels.schedules import group_advantages
from pmpo_kernels.verification.baseline import eager_pmpo_loss

SHOWN = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Quantiles of p and of ESS/n in the log, among the trajectories that have a gradient."""


def train(settings: Settings, folder: Path) -> bool:
    """Do the run and write its log to `folder`. Return False if it was there already."""
    if finished(folder, settings):
        return False
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    device = torch.device(settings.device)
    policy = load_policy(settings.model, folder, device, settings.bfloat16)
    write_log(folder, settings, run(settings, policy))
    return True


def run(settings: Settings, policy: Policy) -> Iterator[Row]:
    """Do the run and yield the rows of the log."""
    s, method, begin = settings, Method(settings.method), time.perf_counter()
    parameters = list(policy.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=s.learning_rate, weight_decay=0.0)
    generator = torch.Generator(policy.device).manual_seed(s.seed)
    yield {"kind": "evaluation", "step": 0, **evaluate(policy, s)}
    for first in range(0, s.steps, s.staleness):
        problems = draw_problems(f"train {s.seed} {first}", s.staleness * s.prompts, policy.levels)
        rollouts = roll_out(policy, problems, s, generator)
        rewards = rollouts.rewards.cpu()
        for k in range(s.staleness):
            step, size = first + k, s.prompts * s.copies
            part = rollouts.take(slice(k * size, (k + 1) * size))
            config, power = method.arguments(step / max(s.steps - 1, 1), rewards)
            out = backward(policy, part, config, power, s.loss)
            norm = torch.nn.utils.clip_grad_norm_(parameters, s.gradient_clip)
            if math.isfinite(norm):  # otherwise the step is left out, and the log says so
                optimizer.step()
            optimizer.zero_grad()
            row = {"kind": "step", "step": step + 1, "off": k, "gradient_norm": _number(norm)}
            yield (
                row
                | {"reward": float(part.rewards.mean()), "tokens": float(part.mask.sum(1).float().mean())}
                | seen(out, part)
            )
        if s.compare_every and first % s.compare_every == 0:
            yield {"kind": "time", "step": step + 1, **times(policy, part, config, power, s.loss)}
        if (first + s.staleness) % s.evaluate_every == 0 or first + s.staleness == s.steps:
            yield {"kind": "evaluation", "step": first + s.staleness, **evaluate(policy, s)}
    yield {"kind": "end", "seconds": time.perf_counter() - begin, "threads": torch.get_num_threads()}


def roll_out(policy: Policy, problems: list[Problem], settings: Settings, generator: torch.Generator) -> Rollouts:
    """Roll out the policy as it is now: its answers, their rewards, the advantages within each problem's group, and log-probs."""
    copies = settings.copies
    input_ids, attention, token_ids, mask = sample(policy, problems, copies, generator)
    rewards = grade(policy, [p for p in problems for _ in range(copies)], token_ids, mask)
    advantages, unknown = group_advantages(rewards, copies), torch.full(mask.shape, torch.nan, device=mask.device)
    rollouts = Rollouts(input_ids, attention, token_ids, mask, rewards, advantages, unknown)
    size, parts = settings.prompts * copies, []
    with torch.no_grad():
        for start in range(0, len(mask), size):
            part = rollouts.take(slice(start, start + size))
            parts.append(token_logp(policy.logits(part), part.token_ids, mask=part.mask).logp)
    rollouts.old_logp = torch.cat(parts)
    return rollouts


def grade(policy: Policy, problems: list[Problem], token_ids: Tensor, mask: Tensor) -> Tensor:
    """Return the rewards (B,) of the answers."""
    answers = zip(problems, token_ids.cpu(), mask.cpu(), strict=True)
    values = [reward(p, policy.decode(ids[keep]), bool((ids == policy.end).any())) for p, ids, keep in answers]
    return torch.tensor(values, device=mask.device)


def evaluate(policy: Policy, settings: Settings) -> Row:
    """Return the part of the evaluation problems that is solved: by samples at temperature 1, by the likeliest tokens, and by
    level."""
    problems = draw_problems("evaluation", settings.evaluation_problems, policy.levels, settings.evaluate_on)
    generator = torch.Generator(policy.device).manual_seed(0)
    solved = []
    for source in (generator, None):
        _, _, token_ids, mask = sample(policy, problems, 1, source)
        solved.append(grade(policy, problems, token_ids, mask))
    by_level = {level: [] for level in policy.levels}
    for problem, value in zip(problems, solved[0].tolist(), strict=True):
        by_level[problem.level].append(value)
    levels = {str(level): sum(v) / len(v) for level, v in by_level.items() if v}
    return {"accuracy": float(solved[0].mean()), "greedy": float(solved[1].mean()), "levels": levels}


def backward(policy: Policy, r: Rollouts, config: LossConfig, power: float | None, loss: LossName) -> PMPOOutput:
    """Add the gradient of a step to the parameters and return the loss's output. With the eager loss the output is computed beside
    it."""
    options = {"mask": r.mask, "config": config, "power": power}
    if loss == "linear":
        hidden, weight = policy.hidden_states(r), policy.model.lm_head.weight
        out = linear_pmpo_loss(
            hidden, weight.to(hidden.dtype), r.token_ids, r.old_logp, r.advantages, skip_zero_advantage=False, **options
        )
        out.loss.backward()
        return out
    logits = policy.logits(r)
    if loss == "logits":
        out = pmpo_loss(logits, r.token_ids, r.old_logp, r.advantages, **options)
        out.loss.backward()
        return out
    eager_loss(logits, r, config, power).backward()
    return pmpo_loss(logits.detach(), r.token_ids, r.old_logp, r.advantages, **options)


def eager_loss(logits: Tensor, r: Rollouts, config: LossConfig, power: float | None) -> Tensor:
    """Compute the same loss in plain PyTorch."""
    each = None if power is None else torch.full_like(r.advantages, power, dtype=torch.float64)
    return eager_pmpo_loss(logits, r.token_ids, r.old_logp, r.advantages, r.mask, config, each)


def times(policy: Policy, r: Rollouts, config: LossConfig, power: float | None, loss: LossName) -> Row:
    """Return the seconds of forward and backward on one batch with our loss and with the eager one, each the better of two."""
    ours: LossName = "logits" if loss == "eager" else loss
    seconds: dict[str, list[float]] = {"ours": [], "eager": []}
    for _ in range(2):
        for name in seconds:
            _wait(policy)
            begin = time.perf_counter()
            if name == "ours":
                backward(policy, r, config, power, ours)
            else:
                eager_loss(policy.logits(r), r, config, power).backward()
            _wait(policy)
            seconds[name].append(time.perf_counter() - begin)
            policy.model.zero_grad()
    return {f"seconds_{name}": min(values) for name, values in seconds.items()}


def seen(out: PMPOOutput, r: Rollouts) -> Row:
    """Return what the log keeps of a step."""
    names = (
        "clip_fraction",
        "clip_fraction_low",
        "clip_fraction_high",
        "ratio_mean",
        "ratio_max",
        "approx_kl",
        "entropy",
    )
    values: Row = {name: _number(out.metrics[name]) for name in names}
    some, at = r.advantages != 0, torch.tensor(SHOWN, dtype=torch.float64, device=r.advantages.device)
    values["with_gradient"] = float(some.float().mean())
    for name, x in (("power", out.power), ("ess", out.ess / r.mask.sum(1))):
        values[name] = [_number(q) for q in x[some].quantile(at)] if bool(some.any()) else None
    return values


def _number(value: Tensor) -> float | None:
    """Return a number for JSON, which has neither NaN nor infinity: None for these."""
    number = float(value)
    return number if math.isfinite(number) else None


def _wait(policy: Policy) -> None:
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)
