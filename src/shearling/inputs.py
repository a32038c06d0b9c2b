"""What a model is given of packed text: ids alone, or with them where each document begins.

Rows of packed text hold documents one after another, each with a mark at its end (`shearling.data.prepare`). Sheared LLaMA
(arXiv 2310.06694) lets a token attend to all that stands before it in its row, whatever document that is of. The other way keeps it
inside its own document, and counts positions from the document's start.

For that, stock models are given `position_ids` that begin anew at each document, and no attention mask and no cache: transformers then
sees that the sequences are packed, row by row, and makes the mask (`find_packed_sequence_indices` in its masking_utils.py, from 5.0 on),
for the attention implementations eager, sdpa and flex_attention, sliding windows included. Flash attention makes no mask, and finds
documents in batches of one row alone; checkpoints that ask for it are refused when they are loaded (`shearling.io.loading`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def model_inputs(ids_BT: Tensor, document_end: int | None) -> dict[str, Any]:
    """Keyword arguments for the forward pass of a stock model over packed rows; every forward pass over such rows takes these.

    Args:
        ids_BT: token ids, int64.
        document_end: id of the mark that ends each document, for attention inside documents; None: a token attends to its whole row.
    """
    inputs: dict[str, Any] = {"input_ids": ids_BT, "use_cache": False}
    return inputs if document_end is None else inputs | {"position_ids": document_positions(ids_BT, document_end)}


def document_positions(ids_BT: Tensor, document_end: int) -> Tensor:
    """How far each token is from the start of its document, or from that of its row where the document began before: [B, T], int64.

    The mark is the last token of the document that it ends. What begins the next document is thus predicted from the mark, which knows
    nothing but the document before; the loss counts that as it counts every other token. At generation, that is what a model without
    BOS starts from: a mark alone.
    """
    places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    begins_BT = F.pad(ids_BT[:, :-1] == document_end, (1, 0), value=True)
    return places_T - torch.where(begins_BT, places_T, 0).cummax(1).values
