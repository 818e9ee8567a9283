"""One chunk of logits in, losses per token and the gradient with respect to the logits out.

Owns the closed forms, and the counts that sums over tokens are divided by. Knows nothing of hidden
states or of where logits come from. Shape suffixes:
N tokens of a call, C of a chunk, R of a block of a chunk, V vocabulary, K sampled ids of a token.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from sparsify.data.rows import TokenRows
from sparsify.data.teacher_samples import Sample
from sparsify.kernels import _head_triton
from sparsify.models.lm_head import HeadTransform
from sparsify.params import LossWeights

NO_TARGET = -100

# Elements of a block per thread on a CPU: small enough for the caches. Measured with V = 32,000,
# the whole loss took within 2 % of the same time for 2^16 to 2^20.
_BLOCK_ELEMENTS = 1 << 17

# Values per token; the kernel's first, in its order.
_VALUES = (
    "max_s", "top_q", "max_t", "top_p", "dot_p", "dot_q", "drift", "agrees", "target", "max_1",
    "top_1", "sampled",
)  # fmt: skip


def has_kernel(logits: Tensor) -> bool:
    """Whether one kernel makes values and gradient of a chunk, rather than PyTorch's operations."""
    return logits.is_cuda and logits.dtype == torch.float32


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of positions that the terms of the loss are divided by."""

    kl: float
    """positions of the KL terms: all but the last of a document that ends inside its row"""
    ce: float
    """positions of the cross-entropy: those whose next token is of the same document"""

    @classmethod
    def of(cls, rows: TokenRows) -> TokenCounts:
        """The counts of some rows."""
        return cls(int(rows.is_taught_NT.sum()), int(rows.has_next_NT.sum()))

    def shared_by(self, num_parts: int) -> TokenCounts:
        """What each of `num_parts` micro-batches divides by, so that the mean of their losses is
        the loss of all their rows together."""
        return TokenCounts(self.kl / num_parts, self.ce / num_parts)


class TokenTerms:
    """The terms of one call of `head_loss`, chunk by chunk.

    Args:
        num_tokens: N.
        weights: the terms.
        counts: what sums over tokens are divided by.
        transform: of the student's head.
        teacher: how the teacher's head transforms, a sample, or None.
        is_taught_N: bool, the tokens of the KL terms; None: all.
        targets_N: int64, NO_TARGET where there is none; None: no cross-entropy.
        like: a tensor of the dtype and device of the logits.
    """

    def __init__(
        self, num_tokens: int, weights: LossWeights, counts: TokenCounts, transform: HeadTransform,
        teacher: HeadTransform | Sample | None, is_taught_N: Tensor | None,
        targets_N: Tensor | None, like: Tensor,
    ) -> None:  # fmt: skip
        self._weights, self._counts = weights, counts
        self._transform, self._teacher = transform, teacher
        self._is_taught_N, self._targets_N = is_taught_N, targets_N
        self._tau = 1.0 if teacher is None else weights.temperature
        if weights.ce == 0 and self._tau != 1:
            self._targets_N = None  # a second softmax for a figure alone is not worth it
        shares = (
            weights.kl and weights.kl * self._tau / counts.kl,
            weights.reverse_kl and weights.reverse_kl * self._tau / counts.kl,
            weights.ce and weights.ce / counts.ce,
        )
        self._unit = max(shares)
        self._kl, self._reverse, self._ce = (share / self._unit for share in shares)
        self.factor = self._unit * transform.scale
        """what the gradient left by `differentiate_` is multiplied by"""
        self._values_KN = like.new_zeros(len(_VALUES), num_tokens)

    @property
    def _num_scratch(self) -> int:
        has_teacher = isinstance(self._teacher, HeadTransform)
        has_second = self._targets_N is not None and self._tau != 1
        return 1 + has_teacher + has_second + (self._transform.soft_cap is not None)

    def differentiate_(
        self, chunk: slice, z_s_CV: Tensor, z_t_CV: Tensor | None, half_CV: Tensor | None = None
    ) -> Tensor:
        """Record a chunk's values, and make the gradient of the student's logits / `factor`.

        Args:
            chunk: which tokens.
            z_s_CV: output of the student's head before its transform; overwritten.
            z_t_CV: the same of the teacher; overwritten.
            half_CV: where the gradient may be put, rounded; None: it must not be rounded.

        Returns:
            The gradient: in `half_CV`, or in the memory of the student's logits.

        Cost: on a GPU in float32 one kernel (`sparsify.kernels._head_triton`), which reads both
        models' logits twice and writes the gradient once. Elsewhere some 20 operations on blocks
        that stay in a CPU's caches, and four more buffers of a block.
        """
        if has_kernel(z_s_CV):
            return self._by_kernel_(chunk, z_s_CV, z_t_CV, half_CV)
        num_rows, num_tokens = z_s_CV.shape
        block_rows = num_rows
        if not z_s_CV.is_cuda:  # stay in the CPU's caches
            block_rows = max(1, torch.get_num_threads() * _BLOCK_ELEMENTS // num_tokens)
        block_rows = min(block_rows, num_rows)
        scratch = z_s_CV.new_empty((self._num_scratch, block_rows, num_tokens))
        for start in range(0, num_rows, block_rows):
            rows = slice(start, min(start + block_rows, num_rows))
            tokens = slice(chunk.start + rows.start, chunk.start + rows.stop)
            buffers = list(scratch[:, : rows.stop - rows.start])
            values = self._values(tokens)
            z_t_RV = None if z_t_CV is None else z_t_CV[rows]
            self._block_(tokens, z_s_CV[rows], z_t_RV, buffers, values)
        return z_s_CV

    def _values(self, tokens: slice) -> dict[str, Tensor]:
        return dict(zip(_VALUES, self._values_KN[:, tokens], strict=True))

    def _by_kernel_(
        self, chunk: slice, u_s_CV: Tensor, u_t_CV: Tensor | None, half_CV: Tensor | None
    ) -> Tensor:
        """`differentiate_` by a kernel; a sample's ids are few, and are added after it."""
        sample = self._teacher if isinstance(self._teacher, Sample) else None
        teacher = self._teacher if isinstance(self._teacher, HeadTransform) else None
        mass_C = None
        if self._teacher is not None:
            mass_C = torch.ones(len(u_s_CV), device=u_s_CV.device)
            if self._is_taught_N is not None:
                mass_C.mul_(self._is_taught_N[chunk])
        grad_CV = u_s_CV if half_CV is None or sample is not None else half_CV
        if sample is not None and mass_C is not None:
            ids_CK = sample.ids_NK[chunk]
            weights_CK = sample.weights_NK[chunk].float()
            z_CK = self._transform.apply_(u_s_CV.gather(1, ids_CK))
            sampled_C = (z_CK / self._tau).mul_(weights_CK).sum(-1)
            self._values(chunk)["sampled"].copy_(sampled_C)
            share_CK = weights_CK * mass_C[:, None]
            mass_C = share_CK.sum(-1)
        _head_triton.differentiate_(
            u_s_CV, u_t_CV, grad_CV, self._values_KN[:, chunk], mass_C,
            None if self._targets_N is None else self._targets_N[chunk],
            _head_triton.Shares(
                self._kl, self._reverse, self._ce, self._tau, astuple(self._transform),
                astuple(teacher or HeadTransform()),
            ),
        )  # fmt: skip
        if sample is not None:
            if self._transform.soft_cap is not None:
                share_CK.mul_(1 - (z_CK / self._transform.soft_cap).square_())
            grad_CV.scatter_add_(1, ids_CK, share_CK.mul_(-self._kl))
        return grad_CV

    def _block_(
        self, tokens: slice, z_RV: Tensor, z_t_RV: Tensor | None, buffers: list[Tensor],
        values: dict[str, Tensor],
    ) -> None:  # fmt: skip
        slope_RV = None
        self._transform.apply_(z_RV)
        if self._transform.soft_cap is not None:  # d cap tanh(u / cap) / du = 1 - (z / cap)^2
            slope_RV = torch.mul(z_RV, z_RV, out=buffers.pop())
            slope_RV.mul_(-1 / self._transform.soft_cap**2).add_(1)
        targets_R1 = None
        if self._targets_N is not None:
            targets_R1 = self._targets_N[tokens, None]
            torch.gather(z_RV, 1, targets_R1.clamp(min=0), out=values["target"][:, None])
        ce_RV = None
        if targets_R1 is not None and self._tau != 1:
            ce_RV = torch.softmax(z_RV, -1, out=buffers.pop())
            torch.amax(z_RV, -1, out=values["max_1"])
            torch.amax(ce_RV, -1, out=values["top_1"])
        if self._tau != 1:
            z_RV.div_(self._tau)
        torch.amax(z_RV, -1, out=values["max_s"])
        q_RV = self._divergence_(tokens, z_RV, z_t_RV, buffers, values)
        if targets_R1 is not None and self._ce:
            self._add_cross_entropy_(z_RV, q_RV if ce_RV is None else ce_RV, targets_R1)
        if slope_RV is not None:
            z_RV.mul_(slope_RV)

    def _divergence_(
        self, tokens: slice, z_RV: Tensor, z_t_RV: Tensor | None, buffers: list[Tensor],
        values: dict[str, Tensor],
    ) -> Tensor:  # fmt: skip
        """q; leaves the gradient of the KL terms in `z_RV`, zero where there is none."""
        if isinstance(self._teacher, Sample):
            q_RV = torch.softmax(z_RV, -1, out=buffers.pop())
            torch.amax(q_RV, -1, out=values["top_q"])
            ids_RK, weights_RK = self._teacher.ids_NK[tokens], self._teacher.weights_NK[tokens]
            weights_RK = weights_RK.to(z_RV.dtype)
            torch.sum(z_RV.gather(1, ids_RK).mul_(weights_RK), -1, out=values["sampled"])
            torch.mul(q_RV, weights_RK.sum(-1, keepdim=True), out=z_RV)
            z_RV.scatter_add_(1, ids_RK, -weights_RK)
            if self._kl != 1:
                z_RV.mul_(self._kl)
        elif z_t_RV is not None:
            q_RV = self._both_divergences_(z_RV, z_t_RV, buffers, values)
        else:
            q_RV = torch.softmax(z_RV, -1, out=buffers.pop())
            torch.amax(q_RV, -1, out=values["top_q"])
            z_RV.zero_()
            return q_RV
        if self._is_taught_N is not None:
            z_RV.masked_fill_(~self._is_taught_N[tokens, None], 0.0)
        return q_RV

    def _both_divergences_(
        self, z_RV: Tensor, z_t_RV: Tensor, buffers: list[Tensor], values: dict[str, Tensor]
    ) -> Tensor:
        """q, in the memory of the teacher's logits; leaves the KL terms' gradient in `z_RV`."""
        assert isinstance(self._teacher, HeadTransform)
        self._teacher.apply_(z_t_RV)
        if self._tau != 1:
            z_t_RV.div_(self._tau)
        first_R1 = z_t_RV.argmax(-1, keepdim=True)
        torch.gather(z_t_RV, 1, first_R1, out=values["max_t"][:, None])
        torch.eq(z_RV.gather(1, first_R1)[:, 0], values["max_s"], out=values["agrees"])
        # D = (z_s - z_t) / tau is log q - log p up to one number per token.
        gap_RV = torch.sub(z_RV, z_t_RV, out=buffers.pop())
        p_RV = torch.softmax(z_t_RV, -1, out=buffers.pop())
        q_RV = torch.softmax(z_RV, -1, out=z_t_RV)
        torch.gather(p_RV, 1, first_R1, out=values["top_p"][:, None])
        torch.amax(q_RV, -1, out=values["top_q"])
        torch.linalg.vecdot(p_RV, gap_RV, out=values["dot_p"])
        torch.linalg.vecdot(q_RV, gap_RV, out=values["dot_q"])
        torch.sub(q_RV, p_RV, out=z_RV)
        torch.sum(z_RV, -1, out=values["drift"])
        if self._kl != 1:
            z_RV.mul_(self._kl)
        if self._reverse:
            # r - E_q[r] = D - E_q[D]: the number per token cancels.
            gap_RV.sub_(values["dot_q"][:, None]).mul_(q_RV)
            z_RV.add_(gap_RV, alpha=self._reverse)
        return q_RV

    def _add_cross_entropy_(self, z_RV: Tensor, q_RV: Tensor, targets_R1: Tensor) -> None:
        share_R1 = (targets_R1 != NO_TARGET).to(z_RV.dtype).mul_(self._ce)
        z_RV.addcmul_(q_RV, share_R1)
        z_RV.scatter_add_(1, targets_R1.clamp(min=0), -share_R1)

    def finish(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss and the unweighted terms, scalars of the logits' dtype."""
        dtype = self._values_KN.dtype
        values = dict(zip(_VALUES, self._values_KN.double(), strict=True))
        # The largest probability is exp(max - log sum exp), so this is log sum exp.
        log_sum_N = values["max_s"] - values["top_q"].log()
        terms: dict[str, Tensor] = {}
        square = self._tau**2 / self._counts.kl if self._counts.kl else 0.0
        if isinstance(self._teacher, Sample):
            total_N = self._teacher.weights_NK.double().sum(-1)
            cross_N = total_N * log_sum_N - values["sampled"]
            terms["kl"] = self._taught_sum(cross_N - self._teacher.entropy_N) * square
        elif self._teacher is not None:
            # What rounding leaves of sum q - sum p is the rounding of the two sums' ratio: with it
            # the logarithm is good to 2e-9 instead of 2e-7, which shows when the KL is small.
            gap_N = log_sum_N - (values["max_t"] - values["top_p"].log()) + values["drift"]
            terms["kl"] = self._taught_sum(gap_N - values["dot_p"]) * square
            terms["reverse_kl"] = self._taught_sum(values["dot_q"] - gap_N) * square
            terms["agreement"] = self._taught_sum(values["agrees"]) / self._counts.kl
        if self._targets_N is not None and self._counts.ce:
            if self._tau != 1:
                log_sum_N = values["max_1"] - values["top_1"].log()
            loss_N = (log_sum_N - values["target"]).masked_fill(self._targets_N == NO_TARGET, 0.0)
            terms["ce"] = loss_N.sum() / self._counts.ce
        loss = torch.zeros((), dtype=torch.float64, device=log_sum_N.device)
        for name in ("kl", "reverse_kl", "ce"):
            if weight := getattr(self._weights, name):
                loss = loss + weight * terms[name]
        return loss.to(dtype), {name: term.to(dtype) for name, term in terms.items()}

    def _taught_sum(self, values_N: Tensor) -> Tensor:
        if self._is_taught_N is not None:
            values_N = values_N.masked_fill(~self._is_taught_N, 0.0)
        return values_N.sum()
