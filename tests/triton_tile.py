"""The tile of `scores.token_logps` in Triton: a contestant of `benchmark.py head`, no more.

The eager tile walks the [n, V] logits some six times between its two matrix products; this kernel
reads them twice and writes them once. It has not met a GPU: test_scores.py runs it in Triton's
interpreter. It moves to scores.py if it beats eager and torch.compile on one by enough to matter.
"""

import torch
import triton
import triton.language as tl

import scores

BLOCK = 4096  # logits that a program holds at one time


@triton.jit
def log_softmax_tile(logits, targets, logps, V, stride, BLOCK: tl.constexpr):
    """A program a row: logps[row] = log softmax(logits)[y]; logits become onehot(y) - softmax."""
    row = tl.program_id(0)
    at = logits + row * stride
    columns = tl.arange(0, BLOCK)
    y = tl.load(targets + row)
    picked = tl.load(at + y).to(tl.float32)  # before anything is stored over it
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)  # of exp(x - top), a running sum in each lane
    for start in range(0, V, BLOCK):
        x = tl.load(at + start + columns, mask=start + columns < V, other=-1e30).to(tl.float32)
        higher = tl.maximum(top, x)
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    highest = tl.max(top, 0)
    norm = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    tl.store(logps + row, picked - norm)
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        x = tl.load(at + start + columns, mask=inside, other=-1e30).to(tl.float32)
        slope = tl.where(start + columns == y, 1.0, 0.0) - tl.exp(x - norm)
        tl.store(at + start + columns, slope.to(logits.dtype.element_ty), mask=inside)


class TritonLogps(scores.TokenLogps):
    """`scores.TokenLogps` with a frozen head and no soft cap; its backward."""

    @staticmethod
    def forward(ctx, hidden, head, targets):
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grads = torch.empty_like(hidden)
        buffer = hidden.new_empty(min(scores.TILE, len(hidden)), len(head))
        for at in range(0, len(hidden), scores.TILE):
            rows = slice(at, at + scores.TILE)
            logits = torch.mm(hidden[rows], head.T, out=buffer[: len(hidden[rows])])
            log_softmax_tile[(len(logits),)](
                logits,
                targets[rows],
                logps[rows],
                len(head),
                logits.stride(0),
                BLOCK,
                num_warps=16,
            )
            grads[rows] = logits @ head
        ctx.frozen = True
        ctx.save_for_backward(grads)
        return logps

    @staticmethod
    def backward(ctx, upstream):
        return scores.TokenLogps.backward(ctx, upstream)[:3]


def token_logps(hidden, head, targets):
    """`scores.token_logps` of a frozen head: hidden [N, H], head [V, H], targets [N] -> [N]."""
    return TritonLogps.apply(hidden, head, targets)
