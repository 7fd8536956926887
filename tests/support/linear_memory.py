"""A linear model whose memory gradients are known: the oracle of gem's tests.

A memory row carries a vector, and the gradient of its cross-entropy at theta = 0 is exactly that vector, so g_k is the
mean of the vectors of task k's rows.
"""

from types import SimpleNamespace

import torch
from torch import nn

from swift_cl.methods._row_store import RowStore, SeenTask, StoredRow
from swift_cl.methods.gem import Gem, GemConfig
from tests.support.fake_context import FakeContext, FakeGradients


class Linear(nn.Module):
    """Two classes with logits (-2 v.theta, 0): at theta = 0 the cross-entropy of class 0 has the gradient v."""

    def __init__(self, width):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(width))
        self.unused = nn.Parameter(torch.zeros(2))  # a trained parameter that the loss does not reach

    def forward(self, vectors):
        score = -2 * vectors @ self.theta
        logits = torch.stack([score, torch.zeros_like(score)], dim=-1)
        return SimpleNamespace(logits=logits.unsqueeze(1).expand(-1, 2, -1))


class VectorContext(FakeContext):
    forwards = 0

    def encode(self, rows):
        return [{k: row[k] for k in ("vectors", "labels") if k in row} for row in rows]

    def collate(self, encoded):
        self.forwards += 1
        return super().collate(encoded)


def vector_row(vector, labels=(-100, 0)):
    messages = [{"role": "user", "content": str(vector)}, {"role": "assistant", "content": "a"}]
    return {"messages": messages, "vectors": [float(x) for x in vector], "labels": list(labels)}


def memory(**tasks):
    """A stored state with the given rows (vectors) of each task."""
    store = RowStore(settings={"strategy": "random"})
    for task, vectors in tasks.items():
        rows = [StoredRow.of(v if isinstance(v, dict) else vector_row(v), task) for v in vectors]
        store.add(SeenTask(task, len(rows), 0), rows, store.shares(999, False, len(rows)))
    return store.state()


def begun(tasks, width=2, rank=0, world_size=1, step=0, **settings):
    """A method that has begun a task with these memories, and its context."""
    ctx = VectorContext(
        Linear(width), earlier=list(tasks), state=memory(**tasks) if tasks else None, rank=rank, world_size=world_size
    )
    ctx.step = step
    method = Gem(GemConfig(**settings))
    method.config.validate()
    method.train_begin(ctx)
    return method, ctx


def gradients(g):
    return FakeGradients({"theta": torch.tensor(g, dtype=torch.float32), "unused": torch.zeros(2)})
