"""Whether a model sees only what it may: no later token, and no other document of a row.

transformers builds a mask of one causal block per document from `position_ids` that start again at
0, for models that hand these ids to its mask code. Some do not (OPT, Bloom, MPT), and a recurrent
state (Mamba) knows no mask, so a model is tried before its rows are trusted.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.models.calls import evaluating, logits_of

_LENGTH = 8

_FROM = 5  # the first token that is another one where later tokens must not be seen

_STARTS = (5, 3)  # where the second document of each of the two rows begins


def check_isolation(model: nn.Module) -> None:
    """Require that no document of a row changes what the model makes of the next one.

    Args:
        model: a causal LM; put into evaluation mode and left in the mode it had.

    Raises:
        InputError: documents see each other, or the model takes no positions.

    Cost: two forwards of 16 tokens, four where rounding differs.
    """
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]

    def logits(rows: TokenRows) -> Tensor:
        try:
            return logits_of(model, rows)
        except TypeError as error:
            if "position_ids" not in str(error):
                raise
            raise InputError(
                f"{type(model).__name__}: takes no position_ids, so documents joined into one row "
                "cannot be kept apart; this model cannot be used"
            ) from None

    with evaluating(model):
        require_isolation(logits, vocabulary, type(model).__name__)


@torch.no_grad()
def require_isolation(run: Callable[[TokenRows], Tensor], vocabulary: int, name: str) -> None:
    """The same of anything that makes tensors (N, T, ...) of rows, such as a model's first block.

    Two rows of two documents each are run twice, with other tokens in the first documents. What
    comes out for the second documents must not change beyond rounding: where it changes at all
    (experts that are shared out among all tokens may round differently), the change must be below
    the square root of the machine epsilon, as a share of the change without positions that restart.

    Args:
        run: the function, without dropout.
        vocabulary: number of tokens; ids are drawn from them.
        name: of the model, for the message.

    Raises:
        InputError: documents see each other.
    """
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(vocabulary, (len(_STARTS), _LENGTH), generator=generator)
    whole = TokenRows.whole(ids_NT)
    starts_N1 = torch.tensor(_STARTS)[:, None]
    is_second_NT = whole.positions_NT >= starts_N1
    changed_NT = torch.where(is_second_NT, ids_NT, (ids_NT + vocabulary // 2) % vocabulary)

    def change(positions_NT: Tensor) -> tuple[float, torch.dtype]:
        first, second = (run(TokenRows(ids, positions_NT)) for ids in (ids_NT, changed_NT))
        difference = (first.double() - second.double())[is_second_NT.to(first.device)]
        return difference.norm().item(), first.dtype

    joined, dtype = change(whole.positions_NT - is_second_NT * starts_N1)
    if joined == 0:
        return
    free, _ = change(whole.positions_NT)
    if joined > math.sqrt(torch.finfo(dtype).eps) * free:
        raise InputError(
            f"{name}: documents joined into one row see each other in this model, whatever its "
            "position_ids say; set data.isolate_documents=false to allow it"
        )


@torch.no_grad()
def require_causal(run: Callable[[TokenRows], Tensor], vocabulary: int, name: str) -> None:
    """Require that no token changes what comes out for the tokens before it.

    transformers offers a causal head for some models that attend to both sides (BERT-Generation as
    an encoder, CPM-Ant before its prefix ends), and no field of the configuration says it for all.
    What may change is rounding, as in `require_isolation`.

    Args:
        run: makes tensors (N, T, ...) of rows, without dropout.
        vocabulary: number of tokens; ids are drawn from them.
        name: of the model, for the message.

    Raises:
        InputError: earlier tokens see later ones.
    """
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(vocabulary, (1, _LENGTH), generator=generator)
    changed_NT = ids_NT.clone()
    changed_NT[:, _FROM:] = (ids_NT[:, _FROM:] + vocabulary // 2) % vocabulary
    first, second = (run(TokenRows.whole(ids)) for ids in (ids_NT, changed_NT))
    change = first.double() - second.double()
    before, after = (part.norm().item() for part in (change[:, :_FROM], change[:, _FROM:]))
    if before > math.sqrt(torch.finfo(first.dtype).eps) * after:
        raise InputError(
            f"{name}: tokens see the tokens after them in this model, so it predicts none; use a "
            "causal language model"
        )
