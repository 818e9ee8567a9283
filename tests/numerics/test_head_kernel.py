"""The kernel of the head's losses: against float64, how often it passes over logits, compiled.

Triton's interpreter runs it in a process of its own, because Triton decides at its import whether
to interpret.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.data.teacher_samples import Sample
from sparsify.distillation import head_terms
from sparsify.distillation.head_loss import Teacher
from sparsify.kernels import _head_triton
from sparsify.models.lm_head import Head, HeadTransform
from sparsify.params import LossWeights
from tests.conftest import REPOSITORY
from tests.numerics.test_head_loss import (
    TRANSFORMS,
    WEIGHTS,
    Problem,
    computed,
    distance,
    make_problem,
    reference,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; the dev extra brings it"
)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

NUM_TOKENS, NUM_WORDS, BLOCK = 11, 150, 64  # three blocks of words, the last one cut

# Of loss and gradients, as in test_head_loss.py; measured 2.7e-7.
RELATIVE = 1e-6


_NO_PASS = tuple(
    getattr(torch.ops.aten, name) for name in ("mm", "addmm_", "empty", "new_empty", "set_")
)
"""products, memory without values, and what the interpreter lends tensors by"""


class Passes(TorchDispatchMode):
    """Reads and writes of (tokens, vocabulary) tensors by PyTorch, products with the heads apart.

    Attributes:
        count: in whole passes over the tokens of the problem.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if not (func.overloadpacket in _NO_PASS or func.is_view):
            given = {id(x): x for x in (*args, *kwargs.values(), found) if isinstance(x, Tensor)}
            large = [x.numel() for x in given.values() if x.ndim == 2 and x.shape[1] == NUM_WORDS]
            self.count += sum(large) / (NUM_TOKENS * NUM_WORDS)
        return found


def without_bias() -> Problem:
    """A bias is added to the logits, and gets the sum of their gradient, by PyTorch."""
    problem = make_problem(NUM_TOKENS, NUM_WORDS)
    head = replace(problem.teacher.head, bias_V=None)
    return replace(problem, bias=None, teacher=replace(problem.teacher, head=head))


def sample_of(teacher: Teacher, tau: float) -> Sample:
    """Five ids of every token, some of them twice."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(NUM_WORDS, (NUM_TOKENS, 5), generator=generator)
    ids[:, 4] = ids[:, 0]
    weights = torch.rand(NUM_TOKENS, 5, generator=generator)
    return Sample(ids, weights, torch.rand(NUM_TOKENS, generator=generator), tau)


def test_the_passes_of_pytorch_are_counted() -> None:
    """So that the law below is not kept by a counter that sees nothing."""
    with Passes() as passes:
        computed(without_bias(), LossWeights(), HeadTransform(), NUM_TOKENS)
    assert 20 < passes.count < 30  # measured 24.0


@needs_triton
def test_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", __file__,
         "-k", "TestInterpreted"],
        cwd=REPOSITORY, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and f"{NUM_INTERPRETED} passed" in done.stdout, done.stdout


NUM_INTERPRETED = len(WEIGHTS) * len(TRANSFORMS) + 2 * len(TRANSFORMS) + 6


@interpreted
class TestInterpreted:
    @pytest.fixture(autouse=True)
    def _on_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(head_terms, "has_kernel", lambda logits: True)
        monkeypatch.setattr(_head_triton, "_WORDS", BLOCK)

    @pytest.mark.parametrize("transform", TRANSFORMS)
    @pytest.mark.parametrize("weights", WEIGHTS)
    def test_equals_float64(self, weights: str, transform: str) -> None:
        problem = make_problem(NUM_TOKENS, NUM_WORDS)
        other = replace(problem.teacher.head, transform=HeadTransform(scale=0.5, soft_cap=6.0))
        if transform != "plain":
            problem.teacher = replace(problem.teacher, head=other)
        expected = reference(problem, WEIGHTS[weights], TRANSFORMS[transform])
        check(computed(problem, WEIGHTS[weights], TRANSFORMS[transform], 7), expected)

    @pytest.mark.parametrize("transform", TRANSFORMS)
    @pytest.mark.parametrize("ce", [0.0, 0.5])
    def test_a_sample_is_what_pytorch_makes_of_it(
        self, ce: float, transform: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tau = 1.5 if ce else 1.0
        problem, weights = make_problem(NUM_TOKENS, NUM_WORDS), LossWeights(ce=ce, temperature=tau)
        sample = sample_of(problem.teacher, tau)
        got = computed(problem, weights, TRANSFORMS[transform], 7, teacher=sample)
        monkeypatch.setattr(head_terms, "has_kernel", lambda logits: False)
        loss, terms, grads = computed(problem, weights, TRANSFORMS[transform], 7, teacher=sample)
        check(got, (loss.double(), terms, [grad.double() for grad in grads]))

    def test_four_passes_each_way_at_most(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """For the values one read of each model's logits, for the gradient another and one write;
        nothing by PyTorch."""
        from triton.runtime.interpreter import InterpreterBuilder

        touched = {"load": 0, "store": 0}
        for name in touched:
            real = getattr(InterpreterBuilder, f"create_masked_{name}")

            def counted(
                self: Any, pointers: Any, *rest: Any, _real: Any = real, _name: str = name
            ) -> Any:
                if pointers.data.size == BLOCK:
                    mask = rest[_name == "store"]
                    touched[_name] += int(mask.data.sum())
                return _real(self, pointers, *rest)

            monkeypatch.setattr(InterpreterBuilder, f"create_masked_{name}", counted)
        for weights, num_models in ((WEIGHTS["all, warm"], 2), (WEIGHTS["ce"], 1)):
            touched.update(load=0, store=0)
            with Passes() as passes:
                computed(without_bias(), weights, TRANSFORMS["scaled and capped"], 7)
            whole = NUM_TOKENS * NUM_WORDS
            assert passes.count == 0
            assert touched == {"load": 2 * num_models * whole, "store": whole}

    def test_late_in_recovery(self) -> None:
        """As in test_head_loss.py: the ratio of the two sums is corrected for their rounding."""
        problem = make_problem(NUM_TOKENS, 400, gap=0.01)
        problem.teacher.head.bias_V.copy_(problem.bias)
        expected = reference(problem, LossWeights(), HeadTransform())
        got = computed(problem, LossWeights(), HeadTransform(), 7)
        assert 1e-5 < expected[0] < 1e-2
        # What the rounding of the logits leaves: measured 3.7e-5, by PyTorch's way 2.6e-5.
        assert distance(got[0], expected[0]) < 1e-4
        for one, other in zip(got[2], expected[2], strict=True):
            assert distance(one, other) < 1e-4

    def test_equal_models(self) -> None:
        problem = make_problem(NUM_TOKENS, NUM_WORDS)
        problem.teacher = Teacher(problem.hidden, Head(problem.weight, problem.bias))
        loss, terms, grads = computed(problem, LossWeights(), HeadTransform())
        assert loss == 0
        assert all(torch.count_nonzero(grad) == 0 for grad in grads)
        expected = problem.is_taught.sum().item() / problem.counts.kl
        assert terms["agreement"].item() == pytest.approx(expected)

    def test_tokens_that_do_not_count_have_no_part(self) -> None:
        """Whatever their logits are, infinity and NaN too."""
        problem, weights = make_problem(NUM_TOKENS, NUM_WORDS), WEIGHTS["all, warm"]
        problem.is_taught[::3] = False
        problem.targets[~problem.is_taught] = head_terms.NO_TARGET
        out = (~problem.is_taught).nonzero()[:, 0]
        before = computed(problem, weights, HeadTransform())
        assert torch.count_nonzero(before[2][0][out]) == 0
        grad = torch.ones(2, NUM_WORDS)
        u_s, u_t = torch.randn(2, 2, NUM_WORDS)
        u_s[0, 3] = u_s[1, 3] = float("nan")
        values = torch.zeros(len(_head_triton.VALUES), 2)
        _head_triton.differentiate_(
            u_s, u_t, grad, values, torch.tensor([0.0, 1.0]), torch.tensor([-100, -100]),
            _head_triton.Shares(1.0, 0.5, 0.3, 1.0, (1.0, None), (1.0, None)),
        )  # fmt: skip
        assert not grad[0].any() and grad[1].isnan().all()
        assert values[1].isnan().all(), "a sum with NaN in it says so"

    def test_of_equal_maxima_the_teachers_first_one_counts(self) -> None:
        u_t = torch.zeros(3, NUM_WORDS)
        u_t[0, [5, 140]] = 2.0  # two of them, blocks apart
        u_t[1, [70, 80]] = 2.0
        u_s = torch.zeros(3, NUM_WORDS)
        u_s[0, 5] = u_s[1, 80] = 1.0
        values = torch.zeros(len(_head_triton.VALUES), 3)
        shares = _head_triton.Shares(1.0, 0.0, 0.0, 1.0, (1.0, None), (1.0, None))
        _head_triton.differentiate_(
            u_s, u_t, torch.empty_like(u_s), values, torch.ones(3), None, shares
        )
        agrees = values[_head_triton.VALUES.index("agrees")]
        assert agrees.tolist() == [1.0, 0.0, 1.0]

    def test_half_precision_is_the_gradient_rounded_once(self) -> None:
        """float16 alone: Triton 3.7.1 cuts bfloat16 off where it interprets."""
        generator = torch.Generator().manual_seed(1)
        u_s, u_t = (3 * torch.randn(5, NUM_WORDS, generator=generator) for _ in range(2))
        shares = _head_triton.Shares(1.0, 0.5, 0.0, 2.0, (1.0, 4.0), (1.0, None))
        found = []
        for out in (torch.empty(5, NUM_WORDS), torch.empty(5, NUM_WORDS, dtype=torch.float16), u_s):
            values = torch.zeros(len(_head_triton.VALUES), 5)
            _head_triton.differentiate_(u_s, u_t, out, values, torch.ones(5), None, shares)
            found.append(out)
        assert torch.equal(found[0].half(), found[1])
        assert torch.equal(found[0], found[2]), "in place"


def check(
    got: tuple[Tensor, dict[str, Tensor], list[Tensor]],
    expected: tuple[Tensor, dict[str, Tensor], list[Tensor]],
) -> None:
    """Loss, terms and gradients within `RELATIVE`."""
    assert got[0].dtype == torch.float32
    assert distance(got[0], expected[0]) < RELATIVE
    for one, other in zip(got[2], expected[2], strict=True):
        assert distance(one, other) < RELATIVE
    assert got[1]
    for name, value in got[1].items():
        assert distance(value, expected[1][name].double()) < RELATIVE, name


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the compiler is not there")
@pytest.mark.parametrize("half", [True, False], ids=["bfloat16 gradient", "float32 gradient"])
def test_it_compiles_for_a_gpu(half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code of compute capability 9.0: 16-byte loads and stores, nothing in memory but
    the logits, and room for two programs on a multiprocessor at least."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    pointers = {
        "student_ptr": "*fp32", "teacher_ptr": "*fp32", "grad_ptr": "*bf16" if half else "*fp32",
        "values_ptr": "*fp32", "mass_ptr": "*fp32", "target_ptr": "*i64",
    }  # fmt: skip
    sizes = ["num_words", "value_stride"]
    numbers = ["scale_s", "cap_s", "scale_t", "cap_t", "per_tau", "kl", "reverse", "ce"]
    constants = {
        "HAS_CAP": not half, "HAS_TEACHER_CAP": not half, "HAS_TEACHER": True, "HAS_MASS": True,
        "HAS_TARGET": True, "HAS_SECOND": not half, "B": _head_triton._WORDS,
    }  # fmt: skip
    signature = {
        **pointers, **dict.fromkeys(sizes, "i32"), **dict.fromkeys(numbers, "fp32"),
        **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    # Vocabularies of models are multiples of 16.
    given = range(len(pointers) + 1)
    source = ASTSource(
        fn=_head_triton._head_kernel, signature=signature, constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in given},
    )  # fmt: skip
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    ptx = made.asm["ptx"]
    assert made.asm["cubin"]
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx
    assert not half or "cvt.rn.bf16x2.f32" in ptx
    assert "ld.local" not in ptx and "st.local" not in ptx
    registers = used_registers(made.asm["cubin"], tmp_path)
    # 65,536 registers over programs of 256 threads; measured RR and RC.
    assert registers <= 128


def used_registers(cubin: bytes, folder: Path) -> int:
    """Registers of a thread, as the assembler notes them."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    return int(done.stdout.split("REG:")[1].split()[0])


@needs_gpu
class TestOnGpu:
    """The tests on the interpreter again, with the kernel in machine code."""

    @pytest.mark.parametrize("transform", TRANSFORMS)
    @pytest.mark.parametrize("weights", WEIGHTS)
    def test_equals_float64(self, weights: str, transform: str) -> None:
        problem = make_problem(NUM_TOKENS, 5003)
        expected = reference(problem, WEIGHTS[weights], TRANSFORMS[transform])
        found = computed(on_gpu(problem), WEIGHTS[weights], TRANSFORMS[transform], 7)
        loss, terms, grads = (found[0].cpu(), found[1], [grad.cpu() for grad in found[2]])
        # The exponential is the GPU's own, off by 2^-22.
        assert distance(loss, expected[0]) < 1e-5
        for one, other in zip(grads, expected[2], strict=True):
            assert distance(one, other) < 1e-5
        for name, value in terms.items():
            assert distance(value.cpu(), expected[1][name]) < 1e-5, name

    def test_half_precision(self) -> None:
        problem = make_problem(64, 5003)
        halves = {name: getattr(problem, name).bfloat16() for name in ("hidden", "weight", "bias")}
        problem = replace(problem, **halves)
        head = problem.teacher.head
        states, weight = problem.teacher.hidden_ND.bfloat16(), head.weight_VD.bfloat16()
        problem.teacher = Teacher(states, replace(head, weight_VD=weight))
        expected = reference(problem, WEIGHTS["all, warm"], HeadTransform())
        found = computed(on_gpu(problem), WEIGHTS["all, warm"], HeadTransform(), 24)
        assert distance(found[0].cpu(), expected[0]) < 1e-5
        for one, other in zip(found[2], expected[2], strict=True):
            assert distance(one.cpu(), other) < 2**-7


def on_gpu(problem: Problem) -> Problem:
    def moved(value: Any) -> Any:
        return value.cuda() if isinstance(value, Tensor) else value

    head = problem.teacher.head
    return Problem(
        moved(problem.hidden), moved(problem.weight), moved(problem.bias),
        Teacher(
            moved(problem.teacher.hidden_ND),
            Head(moved(head.weight_VD), moved(head.bias_V), head.transform),
        ),
        moved(problem.is_taught), moved(problem.targets), problem.counts,
    )  # fmt: skip
