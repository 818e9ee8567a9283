"""A teacher's predictions as a few random token ids per position, for runs that share a teacher.

How they are kept on disk is in `sparsify.data.teacher_samples`.

K ids are drawn per token and weighted so that the sample represents the teacher's distribution
without bias: for every v, E[sum_k weight_k [id_k = v]] = p_v. So the gradient of the forward KL is
right on average, which keeping the K likeliest ids cannot give (Random Sampling KD, Anshumann et
al. 2025, arXiv 2503.16870). Deviation: the paper divides the weights by their sum, which has a bias
when ids are not drawn from p itself; here they are left as they are. Shape suffixes: N tokens, V
vocabulary, K samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.data.rows import CHUNK_TOKENS, chunks
from sparsify.data.teacher_samples import Sample
from sparsify.distillation.head_loss import HeadProducts, Teacher
from sparsify.errors import InputError
from sparsify.kernels.precision import float32_products


@torch.no_grad()
def draw(
    teacher: Teacher,
    num_samples: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    flatness: float = 1.0,
) -> Sample:
    """Draw ids of every token, with replacement, from r proportional to p^(1 / flatness).

    Weights are p_id / (K r_id). At flatness 1 ids come from p and every weight is 1 / K; above it
    unlikely ids come more often, with less weight.

    Args:
        teacher: hidden states (..., D) of N tokens, and the head.
        num_samples: K.
        generator: on the device of the hidden states; the same state draws the same ids.
        temperature: tau of p = softmax(z / tau).
        flatness: 1 or more.

    Raises:
        InputError: a setting out of range.

    Cost: the teacher's head once, with about four buffers of a chunk's logits in float32; half
    precision on a GPU is multiplied on tensor cores. A file of it takes 8 K + 4 bytes per token.
    """
    if num_samples < 1:
        raise InputError(f"teacher sample: {num_samples} samples per token; draw at least 1")
    if not (temperature > 0 and flatness >= 1):
        raise InputError(
            f"teacher sample: temperature {temperature} and flatness {flatness}; the first must be "
            "over 0, the second at least 1"
        )
    head = teacher.head
    dtype = torch.promote_types(teacher.hidden_ND.dtype, torch.float32)
    products = HeadProducts(teacher.hidden_ND, head.weight_VD, dtype)
    ids, weights, entropies = [], [], []
    for tokens in chunks(len(products.hidden_ND), CHUNK_TOKENS):
        hidden_CD = products.chunk(tokens)
        z_CV = hidden_CD.new_empty((len(hidden_CD), len(head.weight_VD)), dtype=dtype)
        with float32_products():
            products.logits_(z_CV, hidden_CD, head.bias_V)
        log_p_CV = head.transform.apply_(z_CV).div_(temperature).log_softmax(-1)
        p_CV = log_p_CV.exp()
        # 0 log 0 is 0: a capped or very cold teacher gives some ids no chance in float32.
        entropies.append(-(p_CV * log_p_CV).nan_to_num(0.0).sum(-1))
        r_CV = p_CV if flatness == 1 else (log_p_CV / flatness).softmax(-1)
        ids_CK = torch.multinomial(r_CV, num_samples, replacement=True, generator=generator)
        chosen_CK = (p_CV.gather(1, ids_CK) / r_CV.gather(1, ids_CK)).div_(num_samples)
        ids.append(ids_CK)
        weights.append(chosen_CK)
    return Sample(torch.cat(ids), torch.cat(weights), torch.cat(entropies), temperature)


def rows_of(sample: Sample, tokens: Tensor | slice) -> Sample:
    """The sample of some of its tokens, in their order."""
    return Sample(
        sample.ids_NK[tokens], sample.weights_NK[tokens], sample.entropy_N[tokens],
        sample.temperature,
    )  # fmt: skip
