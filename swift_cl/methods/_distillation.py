"""Kullback-Leibler divergence between a student's and a teacher's next-token distributions, over many positions.

Imports torch: methods import this module when they run, not at their top.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def divergence_sum(
    student: Tensor, teacher: Tensor, mask: Tensor, temperature: float, top_k: int, chunk: int, reverse: bool = False
) -> Tensor:
    """sum over positions in `mask` of KL(p || q), p = softmax(teacher / T), q = softmax(student / T), in fp32.

    The gradient has a closed form, (q - p) / T per position, and is computed in the same pass, chunk by chunk: beside
    it, three fp32 chunks of logits are alive at a time. No gradient flows into the teacher.

    Args:
        student: logits, [positions, vocabulary].
        teacher: logits of the same shape.
        mask: positions that count; what stands at the others, NaN included, has no effect.
        temperature: T.
        top_k: compare the teacher's k most likely tokens and one bucket of all others; 0 for the full vocabulary.
        chunk: positions at a time.
        reverse: KL(q || p) instead, over the full vocabulary; its gradient is q (log q - log p - KL) / T.
    """
    apply: Any = _DivergenceSum.apply
    compare = _reverse if reverse else _top_k if 0 < top_k < student.shape[-1] else _full
    total: Tensor = apply(student, teacher, mask, temperature, top_k, chunk, compare)
    return total


class _DivergenceSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor,
        temperature: float,
        top_k: int,
        chunk: int,
        compare: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for start in range(0, len(student), chunk):
            part = slice(start, start + chunk)
            log_q = torch.log_softmax(student[part].float() / temperature, dim=-1)
            log_p = torch.log_softmax(teacher[part].float() / temperature, dim=-1)
            divergence, difference = compare(log_q, log_p, top_k)
            outside = ~mask[part]
            total += divergence.masked_fill_(outside, 0.0).sum()
            if gradient is not None:
                gradient[part] = difference.div_(temperature).masked_fill_(outside.unsqueeze(-1), 0.0)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None, None, None


def _full(log_q: Tensor, log_p: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(KL per position, q - p), in the memory of the arguments."""
    p = log_p.exp()
    divergence = log_p.sub_(log_q).mul_(p).sum(dim=-1)
    return divergence, log_q.exp_().sub_(p)


def _reverse(log_q: Tensor, log_p: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(KL(q || p) per position, its gradient with respect to z / T), in the memory of the arguments."""
    q = log_q.exp()
    apart = log_q.sub_(log_p)
    divergence = (q * apart).sum(dim=-1)
    return divergence, apart.sub_(divergence.unsqueeze(-1)).mul_(q)


def _top_k(log_q: Tensor, log_p: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(KL per position, its gradient with respect to z / T) of top-k and rest.

    Within the rest bucket the student's own proportions are the target, so only the bucket's total is pulled.
    """
    log_p_top, tokens = log_p.topk(top_k, dim=-1)
    log_q_top = log_q.gather(-1, tokens)
    log_p_rest = log_p.scatter_(-1, tokens, -torch.inf).logsumexp(dim=-1, keepdim=True)
    log_q_rest = log_q.scatter(-1, tokens, -torch.inf).logsumexp(dim=-1, keepdim=True)
    p_top = log_p_top.exp()
    rest = log_p_rest.exp() * (log_p_rest - log_q_rest)
    divergence = (p_top * (log_p_top - log_q_top)).sum(dim=-1) + rest.squeeze(-1)
    target = (log_q + (log_p_rest - log_q_rest)).exp_().scatter_(-1, tokens, p_top)
    return divergence, log_q.exp_().sub_(target)
