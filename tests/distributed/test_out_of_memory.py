"""Errors that mean out of memory, in the words of PyTorch, CUDA and its libraries, NCCL, NumPy and C++."""

import numpy as np
import pytest
import torch

from triderm_dist.config import TrainConfig
from triderm_dist.distributed.library_errors import is_out_of_memory
from triderm_dist.distributed.out_of_memory import MicroBatch, next_smaller, with_smaller_batches
from triderm_dist.schema import ConfigError


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "HIP out of memory. Tried to allocate 512.00 MiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuFFT error: CUFFT_ALLOC_FAILED",
        "NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
        "CUDA_ERROR_OUT_OF_MEMORY: out of memory",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "GET was unable to find an engine to execute this computation",
        "Triton Error [CUDA]: out of memory",
        "cudaErrorMemoryAllocation",
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
        "unable to mmap 4096 bytes: Cannot allocate memory (12)",
        "std::bad_alloc",
    ],
)
def test_texts_of_libraries_mean_out_of_memory(text):
    assert is_out_of_memory(RuntimeError(text))


def test_types_and_causes_that_mean_out_of_memory():
    with pytest.raises(MemoryError) as numpy_error:
        np.empty(1 << 62, np.uint8)
    wrapped = RuntimeError("the compiler failed")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert all(map(is_out_of_memory, (numpy_error.value, MemoryError(), torch.OutOfMemoryError(), wrapped)))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("[gloo] Connection closed by peer"),
        RuntimeError("CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("out of resource: shared memory, Required: 106496"),
        ValueError("out of memory"),
        OSError(28, "No space left on device"),
    ],
)
def test_other_errors_do_not(error):
    assert not is_out_of_memory(error)


def test_smaller_micro_batches_stay_multiples_of_a_pair():
    assert next_smaller(12, 12) == 6 and next_smaller(6, 12) == 3
    assert next_smaller(9, 9) == 3  # 4 does not divide the global batch
    assert next_smaller(12, 12, smallest=2) == 6 and next_smaller(6, 12, smallest=2) == 2
    with pytest.raises(ConfigError, match="micro-batch of 2"):
        next_smaller(2, 12, smallest=2)


def test_batch_norm_of_one_value_is_explained(tmp_path):
    norm, sizes = torch.nn.BatchNorm2d(3), MicroBatch(tmp_path, "hash", TrainConfig(micro_batch=1, global_batch=4))
    with sizes.fits(1):
        norm(torch.zeros(1, 3, 2, 1))
    message = r"train\.micro_batch: with 1 a trained batch norm has one value per channel"
    with pytest.raises(ConfigError, match=message), sizes.fits(1):
        norm(torch.zeros(1, 3, 1, 1))


def test_inference_halves_its_batch_until_it_fits(capsys):
    sizes = []

    def work(batch: int) -> str:
        sizes.append(batch)
        if batch > 20:
            raise RuntimeError("CUDA error: out of memory")
        return f"done with {batch}"

    assert with_smaller_batches(work, 64, "predict.batch") == ("done with 16", 16)
    assert sizes == [64, 32, 16]
    assert capsys.readouterr().out.count("continuing with predict.batch=") == 2


def test_inference_refuses_what_does_not_fit(monkeypatch):
    def work(batch: int) -> None:
        raise MemoryError

    with pytest.raises(ConfigError, match="single lesion"):
        with_smaller_batches(work, 4, "predict.batch")
    monkeypatch.setenv("WORLD_SIZE", "2")  # the other rank waits in a collective
    with pytest.raises(ConfigError, match=r"set predict\.batch=2"):
        with_smaller_batches(work, 4, "predict.batch")
    with pytest.raises(ZeroDivisionError):
        with_smaller_batches(lambda batch: batch // 0, 4, "predict.batch")
