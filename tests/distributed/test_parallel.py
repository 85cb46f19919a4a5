"""What ranks share on a host, and how gradients of shards are clipped."""

import pytest
import torch

from triderm_dist.distributed.parallel import _clip_shards, share_compile_threads


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"LOCAL_WORLD_SIZE": "8"}, "24"),
        ({"LOCAL_WORLD_SIZE": "4"}, "32"),
        ({"LOCAL_WORLD_SIZE": "300"}, "1"),
        ({"LOCAL_WORLD_SIZE": "8", "TORCHINDUCTOR_COMPILE_THREADS": "2"}, "2"),
        ({}, None),
    ],
)
def test_ranks_share_the_processes_of_the_compiler(environment, threads):
    share_compile_threads(environment, 192)
    assert environment.get("TORCHINDUCTOR_COMPILE_THREADS") == threads


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_shards_are_clipped_as_pytorch_clips(max_norm):
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 50, 1)]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    ours = [parameter.grad.clone() for parameter in parameters]
    norm = _clip_shards(ours, max_norm)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    for gradient, parameter in zip(ours, parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
