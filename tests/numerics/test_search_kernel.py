"""The kernels of ADMM and of the refit: against PyTorch, what they read and write, compiled.

As in `test_kernels`, Triton's interpreter runs them in a process of its own, and they are compiled
for GPUs here.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from jobs.benchmarks.support.kernel_costs import KERNELS
from sparsify.kernels import _admm_triton, _refit_triton
from sparsify.methods import Problem, PruneParams, _refit, admm
from sparsify.methods._base import chosen_mask
from sparsify.methods._refit import objective, refit_with_errors
from sparsify.pattern import Pattern
from tests.numerics.test_kernels import needs_gpu, needs_triton
from tests.numerics.test_packed_linear_cuda import disassembled
from tests.numerics.test_refit import case

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SEARCH = ("_admm_start_kernel", "_admm_step_kernel", "_admm_turn_kernel")
REFIT = ("_refit_start_kernel", "_refit_step_kernel", "_refit_accept_kernel")


def layer(num_rows: int = 6, num_columns: int = 80) -> tuple[Tensor, Tensor, Tensor]:
    """float64 target with a row of zeros and one of tiny numbers, a damped Hessian of columns of
    other sizes, and an allowed mask."""
    target, _, damped = case(num_rows, num_columns)
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-1, 1, num_columns, dtype=torch.float64)
    sizes = sizes[torch.randperm(num_columns, generator=generator)]
    target[1] = 0.0
    target[2] *= 1e-12
    allowed = torch.rand(target.shape, generator=generator) < 0.8
    return target, damped * sizes * sizes[:, None], allowed


@contextmanager
def kernels_on_a_cpu(tile: int = 32) -> Iterator[None]:
    """The kernels take matrices of a CPU, so many columns at one time."""
    with (
        patch.object(admm, "has_kernels", lambda _: True),
        patch.object(_refit, "has_kernels", lambda _: True),
        patch.object(_admm_triton, "_TILE", tile),
        patch.object(_refit_triton, "_TILE", tile),
    ):
        yield


def searched(
    target: Tensor, damped: Tensor, text: str, allowed: Tensor | None, params: PruneParams
) -> tuple[Tensor, Tensor]:
    problem, pattern = Problem("layer", target, allowed_OI=allowed), Pattern.parse(text)
    keep = chosen_mask(target.abs() * admm.column_scales(damped), problem, pattern)
    given = target.clone(), damped.clone(), keep.clone()
    found = admm.search(target, damped, problem, pattern, params, keep)
    assert all(torch.equal(*pair) for pair in zip((target, damped, keep), given, strict=True))
    return found


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, of each row's largest number."""
    largest = expected.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return float(((found.double() - expected.double()) / largest).abs().max())


if INTERPRETED:

    class TestInterpreted:
        """Run by tests/integration/test_processes.py."""

        @pytest.mark.parametrize(
            ("text", "is_free", "precision"),
            [
                ("2:4", True, "float32"), ("2:4", True, "half"), ("2:4", False, "half"),
                ("4:8", False, "float32"), ("1:2", True, "half"), ("8:16", True, "float32"),
            ],
        )  # fmt: skip
        def test_search_equals_pytorch(self, text: str, is_free: bool, precision: str) -> None:
            """Three tiles of a row, of which the last is cut short. The oracle computes in float64;
            half precision rounds directions, so that it has to start from the same ones."""
            target, damped, allowed = layer()
            given = (target.float(), damped.float(), text, None if is_free else allowed)
            params = PruneParams(search_precision=precision, admm_iterations=4)
            oracle = (target, damped) if precision == "float32" else given[:2]
            expected, mask = searched(*oracle, *given[2:], params)
            with kernels_on_a_cpu():
                found, keep = searched(*given, params)
            assert torch.equal(keep, mask)
            assert not found[~keep].any()
            # Eight products in float32. A last bit of a direction decides how it is rounded to half
            # precision. Measured 4e-7 and 7e-5.
            assert off(found, expected) < (4e-6 if precision == "float32" else 5e-4)

        @pytest.mark.parametrize("iterations", [1, 2, 6])
        def test_refit_equals_pytorch(self, iterations: int) -> None:
            target, damped, mask = layer()
            mask[3] = False  # a row without weights
            mask[4] = True  # a row that can reach its target
            given = (target.float(), target.float(), mask, damped.float(), iterations)
            expected, errors = refit_with_errors(*given)
            with kernels_on_a_cpu():
                found, found_errors = refit_with_errors(*given)
            assert not found[~mask].any()
            # float32 summed in another order; measured 5e-7, and 3e-7 of the errors.
            assert off(found, expected) < 5e-6
            torch.testing.assert_close(found_errors, errors, rtol=3e-6, atol=0)

        def test_a_layer_equals_pytorch(self) -> None:
            """Also a row that keeps Wanda's choice, which the search leaves as it was."""
            target, damped, _ = layer()
            target[1] = torch.zeros(80).scatter(0, torch.arange(0, 80, 4), 1.0)
            given = target.float(), damped.float()
            pattern, params = Pattern.parse("2:4"), PruneParams(admm_iterations=3)
            expected, mask = admm.search_and_refit(
                target, damped, Problem("layer", target), pattern, params
            )
            with kernels_on_a_cpu():
                found, keep = admm.search_and_refit(
                    *given, Problem("layer", given[0]), pattern, params
                )
            assert torch.equal(found[1], given[0][1]) and torch.equal(keep, mask)
            # Measured 6e-7.
            assert off(found, expected) < 5e-6

        def test_several_weights_at_once_are_as_each_alone(self) -> None:
            """Each with its own Hessian, from whose diagonal the refit takes its scale."""
            targets, hessians, masks = (torch.stack((part, part)) for part in layer())
            hessians[1] = layer(num_columns=80)[1].flip(0, 1)
            scale = admm.column_scales(hessians)
            correlations = (hessians / scale / scale.mT).float()
            keep = (targets.abs() >= targets.abs().median()) & masks
            penalties = [0.3, 0.5]

            def search(index: Any) -> tuple[Tensor, Tensor]:
                return _admm_triton.search(
                    targets[index].float(), keep[index].clone(), correlations[index].half(),
                    penalties, 2, 4, masks[index],
                )  # fmt: skip

            def refit(index: Any) -> tuple[Tensor, Tensor]:
                start = (targets[index] * masks[index]).float()
                return refit_with_errors(
                    start, targets[index].float(), masks[index], hessians[index].float(), 3
                )

            with kernels_on_a_cpu(tile=128):
                for run in (search, refit):
                    together, alone = run(slice(None)), [run(index) for index in (0, 1)]
                    for both, parts in zip(together, zip(*alone, strict=True), strict=True):
                        if both.dtype == torch.bool:
                            assert torch.equal(both, torch.stack(parts))
                        else:  # products of other shapes round differently
                            torch.testing.assert_close(both, torch.stack(parts))

        @pytest.mark.parametrize("precision", ["float32", "half"])
        def test_they_read_and_write_what_the_roofline_counts(self, precision: str) -> None:
            """But for numbers of rows and columns, which it leaves out."""
            target, damped, allowed = layer()
            target[1] = 2 * target[0]  # a row of zeros is not written
            moved = Moved()
            with kernels_on_a_cpu(), moved:
                found, keep = searched(
                    target.float(), damped.float(), "2:4", allowed,
                    PruneParams(search_precision=precision, admm_iterations=2),
                )  # fmt: skip
                refit_with_errors(found, target.float(), keep, damped.float(), 3)
            assert {name for name, *_ in moved.launches} == {*SEARCH, *REFIT}
            for name, counted, actual in moved.launches:
                # The inverse diagonal, for each row of the residual; and up to 8 numbers of a row.
                rows, columns = target.shape
                scales = {"_refit_start_kernel": 1, "_refit_step_kernel": 2}.get(name, 0)
                more = 4 * rows * (scales * columns + 8)
                assert counted < actual <= counted + more, name


class Moved:
    """Bytes that the interpreter loads and stores in each launch, beside what `KERNELS` says."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, float, float]] = []
        self._bytes = 0.0

    def __enter__(self) -> Moved:
        from triton.runtime import interpreter

        builder, function = interpreter.InterpreterBuilder, interpreter.GridExecutor
        load, store = builder.create_masked_load, builder.create_masked_store
        call = function.__call__

        def count(ptrs: Any, mask: Any) -> None:
            width = ptrs.dtype.element_ty.primitive_bitwidth
            self._bytes += mask.data.sum() * max(width // 8, 1)

        def loaded(this: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            count(ptrs, mask)
            return load(this, ptrs, mask, *rest)

        def stored(this: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            count(ptrs, mask)
            return store(this, ptrs, value, mask, *rest)

        def launched(this: Any, *args: Any, **kwargs: Any) -> Any:
            before = self._bytes
            done = call(this, *args, **kwargs)
            named = dict(zip(this.arg_names, args, strict=False)) | kwargs
            name = this.fn.__name__
            self.launches.append((name, KERNELS[name](named).num_bytes, self._bytes - before))
            return done

        self._patches = [
            patch.object(builder, "create_masked_load", loaded),
            patch.object(builder, "create_masked_store", stored),
            patch.object(function, "__call__", launched),
        ]
        for one in self._patches:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._patches:
            one.stop()


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the compiler is not there")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", [*SEARCH, *REFIT])
def test_kernels_compile_for_a_gpu(
    name: str, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code: 16 bytes at one time, nothing spilled, sums without atomics, and room for
    two programs on a multiprocessor at least."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    module = _admm_triton if name in SEARCH else _refit_triton
    function = getattr(module, name)
    values = {"IS_HALF": True, "HAS_ALLOWED": True, "IS_FIRST": False, "IS_LAST": False, "N": 2,
              "M": 4, "B": module._TILE}  # fmt: skip
    types = {"keep_ptr": "*i1", "allowed_ptr": "*i1", "half_ptr": "*fp16", "penalty": "fp32",
             "following": "fp32"}  # fmt: skip
    names = function.arg_names
    constants = {name: value for name, value in values.items() if name in names}
    signature = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
                 for name in names} | dict.fromkeys(constants, "constexpr")  # fmt: skip
    # Pointers, and the columns of a model.
    given = [i for i, name in enumerate(names) if name.endswith("_ptr") or name == "num_columns"]
    source = ASTSource(
        fn=function, signature=signature, constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in given},
    )  # fmt: skip
    made = compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 8})
    ptx = made.asm["ptx"]
    assert re.search(r"ld\.global[.\w:]*\.v4\.b32", ptx)
    assert not re.search(r"\b(atom|red)\.", ptx)
    text, registers, stack, local = disassembled(made)
    assert local == 0 and stack <= 32 and not re.search(r"\bSTL\b", text)
    # 65,536 registers over programs of 256 threads; the largest takes 106.
    assert registers <= 128


@needs_gpu
class TestOnGpu:
    @pytest.mark.parametrize("num_columns", [320, 4096 + 320])
    @pytest.mark.parametrize("precision", ["float32", "half"])
    def test_a_layer_loses_no_more_than_on_a_cpu(self, num_columns: int, precision: str) -> None:
        target, damped, _ = layer(64, num_columns)
        params = PruneParams(search_precision=precision)
        pattern = Pattern.parse("2:4")
        found = []
        for device in ("cpu", "cuda"):
            given = target.float().to(device), damped.float().to(device)
            problem = Problem("layer", given[0])
            found.append(admm.search_and_refit(*given, problem, pattern, params))
        (weight, keep), (on_gpu, kept) = found
        assert (kept.cpu() != keep).double().mean() < 0.01, "near ties alone"
        assert (kept.cpu().view(64, -1, 4).sum(-1) == 2).all() and not on_gpu[~kept].any()
        errors = [objective(w.cpu().double(), target, damped) for w in (weight, on_gpu)]
        live = errors[0] > 0
        assert math.isclose(errors[1][live].sum(), errors[0][live].sum(), rel_tol=1e-3)

    def test_the_same_bits_again(self) -> None:
        target, damped, _ = layer(64, 320)
        given = target.float().cuda(), damped.float().cuda()
        problem = Problem("layer", given[0])
        runs = [
            admm.search_and_refit(*given, problem, Pattern.parse("2:4"), PruneParams())
            for _ in range(2)
        ]
        assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
