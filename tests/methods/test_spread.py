"""Vectors that several ranks hold in parts compute what one rank computes that holds all."""

import pytest
import torch
from torch import Size

from swift_cl.methods._spread import Layout
from tests.support.fake_context import FakeContext
from tests.support.ranks import on_ranks

# Fewer numbers than ranks, as many, not divisible, divisible.
SHAPES = {"one": Size([1]), "three": Size([3]), "seven": Size([7]), "table": Size([4, 3])}


def tensors(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator) for shape in SHAPES.values()]


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parts_are_the_whole(world_size: int, spread: bool) -> None:
    total = [torch.stack(same).sum(0) for same in zip(*map(tensors, range(world_size)), strict=True)]
    flat = torch.cat([tensor.reshape(-1) for tensor in total])
    other = torch.arange(23.0)

    def work(ctx: FakeContext) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        layout = Layout(ctx, SHAPES, spread)
        summed = layout.summed(tensors(ctx.rank))
        pieces = other.split([shape.numel() for shape in SHAPES.values()])
        second = layout.own(piece.view(shape) for piece, shape in zip(pieces, SHAPES.values(), strict=True))
        named = dict(layout.whole(summed))
        assert list(named) == list(SHAPES)
        return layout.products([summed, second]), list(named.values()), len(summed)

    found = on_ranks(world_size, lambda rank, size: FakeContext(rank=rank, world_size=size), work)
    for products, whole, _ in found:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, total, strict=True))
        assert [tensor.shape for tensor in whole] == list(SHAPES.values())
        expected = torch.stack([flat, other]).double() @ torch.stack([flat, other]).double().T
        assert torch.allclose(products, expected, rtol=1e-5)
        assert torch.equal(products, found[0][0])
    assert sum(kept for *_, kept in found) == (23 if spread else 23 * world_size)


def test_vectors_are_fp32_copies() -> None:
    tensor = torch.ones(3, dtype=torch.bfloat16)
    layout = Layout(FakeContext(), {"a": tensor.shape}, False)
    assert layout.own([tensor]).dtype == torch.float32
    single = torch.ones(3)
    layout.own([single]).zero_()
    assert single.tolist() == [1, 1, 1]


def test_replicas_go_by_the_products_of_the_first() -> None:
    """Each rank holds all, and theirs differ by what a different order of sums may make of them."""

    def work(ctx: FakeContext) -> float:
        layout = Layout(ctx, {"a": Size([1])}, False)
        return layout.products([torch.tensor([2.0 + ctx.rank])]).item()

    assert on_ranks(2, lambda rank, size: FakeContext(rank=rank, world_size=size), work) == [4.0, 4.0]
