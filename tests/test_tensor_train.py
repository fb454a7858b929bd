"""Tensor trains: their error, their size, and an embedding that is looked up in one."""

import itertools

import numpy as np
import pytest
import torch

from rooflm.lab.factorize.svd import decompose, truncate
from rooflm.lab.factorize.tensor_train import (
    matrix_train,
    multiply_up,
    token_train,
    train_numbers,
    tt_svd,
)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(cores, item):
    """A train multiplied up entry by entry."""
    shape = [core.shape[2] for core in cores]
    out = np.zeros(shape)
    for index in itertools.product(*map(range, shape)):
        product = np.eye(1)
        for core, i in zip(cores, index, strict=True):
            product = product @ core[item, :, i].numpy()
        out[index] = product[0, 0]
    return out


def test_an_uncut_train_is_exact_and_multiplies_up_as_defined():
    x = noise(3, 2, 4, 3, 2)
    found = tt_svd(x, 99)
    whole = multiply_up(found.cores).view(x.shape)
    assert torch.allclose(whole, x.double(), atol=1e-6) and not found.left_out.any()
    cut = tt_svd(x, 2)
    assert np.allclose(by_hand(cut.cores, 1), multiply_up(cut.cores).view(x.shape)[1])


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_squared_error_is_at_most_what_the_cuts_left_out(rank):
    x = noise(5, 4, 3, 4, 2, seed=rank).double()
    found = tt_svd(x, rank)
    error = (multiply_up(found.cores) - x.flatten(1)).square().sum(1)
    assert (error <= found.left_out * (1 + 1e-9) + 1e-12).all()
    # No chain of this width is nearer than each unfolding's own tail.
    for k in range(1, 4):
        unfolded = x.flatten(1).view(5, int(np.prod(x.shape[1 : k + 1])), -1)
        tail = torch.linalg.svdvals(unfolded)[:, rank:].square().sum(1)
        assert (error >= tail * (1 - 1e-9) - 1e-12).all()


def test_two_modes_are_the_truncated_svd():
    x = noise(6, 8)
    found = tt_svd(x[None], 3)
    assert torch.allclose(
        multiply_up(found.cores).view(6, 8).float(), truncate(decompose(x), 3).weight, atol=1e-5
    )
    tail = torch.linalg.svdvals(x.double())[3:].square().sum()
    assert found.left_out.item() == pytest.approx(tail.item(), rel=1e-9)


def test_a_train_of_rank_one_is_found():
    parts = [noise(n, seed=n).double() for n in (3, 4, 5)]
    x = torch.einsum("i,j,k->ijk", *parts)
    found = tt_svd(x[None], 1)
    assert torch.allclose(multiply_up(found.cores).view(3, 4, 5), x, atol=1e-9)


def test_numbers_are_those_of_the_cores():
    for modes, rank in (((4, 4, 4, 4), 2), ((4, 4, 4, 4), 16), ((2,) * 8, 3), ((8, 8, 4), 6)):
        cores = tt_svd(noise(1, *modes), rank).cores
        assert train_numbers(modes, rank) == sum(core[0].numel() for core in cores)
    weight = noise(20, 64)
    assert token_train(weight, (4, 4, 4), 2).numbers == 20 * train_numbers((4, 4, 4), 2)
    made = matrix_train(weight, (4, 5), (8, 8), 3)
    assert made.numbers == train_numbers((32, 40), 3) == 3 * (32 + 40)


def test_a_token_train_looks_up_each_vector_for_itself():
    weight = noise(20, 64)
    made = token_train(weight, (4, 4, 4), 2)
    tokens = torch.tensor([[3, 19, 3], [0, 7, 11]])
    found = made(tokens)
    assert found.shape == (2, 3, 64) and torch.equal(found[0, 0], found[0, 2])
    for token in (3, 19, 0):
        alone = multiply_up(tt_svd(weight[token].view(1, 4, 4, 4), 2).cores)[0]
        assert torch.allclose(made(torch.tensor(token)), alone.float(), atol=1e-5)
    assert torch.allclose(made.weight[tokens], found, atol=1e-6)
    exact = token_train(weight, (4, 4, 4), 4)
    assert torch.allclose(exact.weight, weight, atol=1e-5)


def test_a_matrix_train_takes_the_digits_of_token_and_channel():
    weight = noise(12, 30)
    made = matrix_train(weight, (3, 4), (5, 6), 99)
    assert torch.allclose(made.weight, weight, atol=1e-5)
    cut = matrix_train(weight, (3, 4), (5, 6), 2)
    # With two modes it is the SVD of the rearranged matrix (Kronecker products of rank 2).
    arranged = weight.view(3, 4, 5, 6).permute(0, 2, 1, 3).reshape(15, 24)
    low = truncate(decompose(arranged), 2).weight
    back = low.view(3, 5, 4, 6).permute(0, 2, 1, 3).reshape(12, 30)
    assert torch.allclose(cut.weight, back, atol=1e-5)
    assert torch.allclose(cut(torch.arange(12)), cut.weight, atol=1e-6)


def test_three_digits_come_back_in_order():
    weight = noise(24, 12)
    made = matrix_train(weight, (2, 3, 4), (3, 2, 2), 99)
    assert torch.allclose(made.weight, weight, atol=1e-5)
    assert torch.allclose(made(torch.tensor([17])), weight[17:18], atol=1e-5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"modes is .*allowed: sizes of product 64"):
        token_train(noise(20, 64), (4, 4), 2)
    with pytest.raises(ValueError, match="rows has 2 sizes and columns 3"):
        matrix_train(noise(12, 30), (3, 4), (5, 3, 2), 2)
    with pytest.raises(ValueError, match="rank"):
        tt_svd(noise(2, 4, 4), 0)
    with pytest.raises(ValueError, match=r"allowed: \(batch, n_1"):
        tt_svd(noise(2), 1)
