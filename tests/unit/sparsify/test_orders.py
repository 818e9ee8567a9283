"""Which kernels a device has for a packed layer, and what is said where it has none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sparsify.kernels import orders
from sparsify.packed.layout import Layer, Scheme
from sparsify.pattern import Pattern

INT4 = Layer((64, 256), Scheme("int", 4, 128), Pattern.parse("2:4"))
FLOAT = Layer((64, 256), Scheme(), Pattern.parse("2:4"))


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    orders._why_no_gpu_kernels.cache_clear()
    yield
    orders._why_no_gpu_kernels.cache_clear()


def test_a_gpu_takes_half_precision_and_values_of_the_inputs_type() -> None:
    cuda = orders.ORDERS["cuda"]
    if orders.triton is None:
        pytest.skip("Triton is not installed; the dev extra brings it")
    assert cuda.kind(INT4, torch.uint8) == "int4"
    assert cuda.kind(FLOAT, torch.bfloat16) == "bfloat16"
    assert cuda.kind(FLOAT, torch.float32) is None
    assert cuda.kind(Layer((64, 256), Scheme(), Pattern.parse("4:8")), torch.bfloat16) is None
    assert cuda.takes("int4", torch.float16) and cuda.takes("int4", torch.bfloat16)
    assert not cuda.takes("int4", torch.float32)
    assert cuda.takes("bfloat16", torch.bfloat16) and not cuda.takes("bfloat16", torch.float16)


def test_without_triton_layers_run_in_pytorch_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(orders, "triton", None)
    with pytest.warns(RuntimeWarning, match="Triton is not installed; .* several times slower"):
        assert orders.ORDERS["cuda"].kind(INT4, torch.uint8) is None
    assert orders.ORDERS["cuda"].kind(INT4, torch.uint8) is None  # no second one: it would raise


def test_a_card_without_sparse_tensor_cores_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "triton", object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.warns(RuntimeWarning, match=r"compute capability 8\.0 \(Ampere\)"):
        assert orders.ORDERS["cuda"].kind(INT4, torch.uint8) is None
