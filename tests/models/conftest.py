"""What tests of models have in common."""

from collections.abc import Iterator

import pytest
import torch

from penstock_workers.embedding.c_kernels import Kernels, find_kernels


@pytest.fixture(scope="module", autouse=True)
def threads_as_they_were() -> Iterator[None]:
    """What a file sets for torch is no matter of the next one: which engine computes depends on it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    """The compiled functions, in a process of one thread as workers have it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = find_kernels(torch.device("cpu"), torch.bfloat16)
        if found is None:
            pytest.skip("the CPU has no AVX-512 BF16, or there was no C compiler")
        yield found
    finally:
        torch.set_num_threads(before)
