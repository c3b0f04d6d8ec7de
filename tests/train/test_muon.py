"""Muon against PyTorch's, whose iteration is bfloat16, and against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from segmenter_fast.train.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(48, 48), (24, 96), (96, 24), (1, 7)])
def test_singular_values_end_near_one_in_their_own_directions(shape: tuple[int, int]) -> None:
    matrix = 1e-4 * torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonal(matrix) @ v.T
    values = found.diagonal()
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert (found - torch.diag(values)).abs().max() < 1e-3
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_matrices_follow_pytorchs_muon_and_the_rest_its_adamw() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(32, 64), torch.randn(64, 16), torch.randn(16)]
    ours, peers = ([torch.nn.Parameter(tensor.clone()) for tensor in tensors] for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizer = Muon(
        [{"params": ours[:2], "orthogonal": True}, {"params": ours[2:]}], betas=(0.8, 0.9), momentum=0.7, **options
    )
    muon = torch.optim.Muon(peers[:2], momentum=0.7, adjust_lr_fn="match_rms_adamw", **options)
    adamw = torch.optim.AdamW(peers[2:], betas=(0.8, 0.9), **options)
    for _ in range(5):
        for left, right in zip(ours, peers, strict=True):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()
        for stepper in (optimizer, muon, adamw):
            stepper.step()
        assert all(torch.equal(left.grad, right.grad) for left, right in zip(ours, peers, strict=True))
    assert torch.equal(ours[2], peers[2])
    for left, right, start in zip(ours[:2], peers[:2], tensors[:2], strict=True):
        assert (left - right).norm() < 0.02 * (right - start).norm()
        assert (right - start).norm() > 0.005 * start.norm()


def test_what_is_no_matrix_cannot_become_orthogonal() -> None:
    group = {"params": [torch.nn.Parameter(torch.zeros(3))], "orthogonal": True}
    with pytest.raises(ValueError, match=r"orthogonal parameters must be matrices, got shape \(3,\)"):
        Muon([group], 1e-3, (0.9, 0.99), 0.0, 0.95)
