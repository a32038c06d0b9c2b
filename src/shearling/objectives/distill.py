"""Distillation: a model in training learns the predictions and the states of its source.

The source's logits are computed a few rows at a time beside those of the model, so that of all logits of a microbatch the model's
alone are ever there, once (`row_losses`).

Legend: B sequences, T tokens, N = B T positions of which n at a time, V tokens of the vocabulary, k of them the likeliest, C classes of a
prediction (V, or k and one for all others), H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log
from typing import Protocol

import torch
from torch import Tensor, nn

from shearling.inputs import model_inputs
from shearling.objectives.config import DistillConfig
from shearling.objectives.lm import next_tokens, row_losses, text_loss
from shearling.objectives.states import States, projected

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(log-probabilities of the model [n, C], of the source [n, C]) -> nats [n], and their gradient to the model's logits [n, C]."""


def forward_kl(log_q_nC: Tensor, log_p_nC: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum p (log p - log q); its gradient to the logits of q is q - p. Hinton et al., arXiv 1503.02531."""
    p_nC = log_p_nC.exp()
    # log p is finite: a log-softmax of finite numbers
    return (p_nC * (log_p_nC - log_q_nC)).sum(-1), log_q_nC.exp().sub_(p_nC)


def reverse_kl(log_q_nC: Tensor, log_p_nC: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) = sum q (log q - log p); its gradient is q (log q - log p - KL). Gu et al., MiniLLM, arXiv 2306.08543."""
    q_nC, apart_nC = log_q_nC.exp(), log_q_nC - log_p_nC
    found_n = (q_nC * apart_nC).sum(-1)
    return found_n, apart_nC.sub_(found_n[:, None]).mul_(q_nC)


def jsd(log_q_nC: Tensor, log_p_nC: Tensor) -> tuple[Tensor, Tensor]:
    """Jensen-Shannon divergence, half KL(p || m) and half KL(q || m) with m = (p + q) / 2.

    Its gradient is q (log q - log m - KL(q || m)) / 2.
    Agarwal et al., arXiv 2306.13649, equation 1 with beta = 1/2.
    """
    log_m_nC = torch.logaddexp(log_p_nC, log_q_nC).sub_(log(2))
    q_nC, apart_nC = log_q_nC.exp(), log_q_nC - log_m_nC
    from_q_n = (q_nC * apart_nC).sum(-1)
    from_p_n = (log_p_nC.exp() * (log_p_nC - log_m_nC)).sum(-1)
    return (from_p_n + from_q_n) / 2, apart_nC.sub_(from_q_n[:, None]).mul_(q_nC).div_(2)


DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


@dataclass(frozen=True)
class Prediction:
    """What the source predicts at n positions."""

    log_p_nC: Tensor
    """Log-probabilities of the classes, fp32: of every token, or of the likeliest k and of all others together."""
    ids_nk: Tensor | None = None
    """The likeliest tokens; None where every token is a class."""


class Predictions(Protocol):
    """The source's predictions at the positions of one microbatch."""

    def __call__(self, rows: slice) -> Prediction:
        """Of these rows of the N positions; they are asked for in order, once."""
        ...


class Source(Protocol):
    """What is learnt from (`shearling.objectives.teacher.Teacher`)."""

    def __call__(self, ids_BT: Tensor) -> tuple[Predictions, Mapping[str, Tensor]]:
        """Predictions at the B * T positions, and the states that are compared, [B, T, H] by name."""
        ...


def likeliest(log_p_nV: Tensor, k: int) -> Prediction:
    """The k likeliest tokens one by one, and all others as one class."""
    top_nk, ids_nk = log_p_nV.topk(min(k, log_p_nV.shape[1] - 1))
    return Prediction(torch.cat([top_nk, _others(log_p_nV, ids_nk)], -1), ids_nk)


def divergence(log_q_nV: Tensor, source: Prediction, kind: Divergence) -> tuple[Tensor, Tensor]:
    """Divergence [n] between the source's prediction and the model's, and its gradient to the model's logits [n, V].

    Where the source has one class for many tokens, so has the model here: that is the divergence of the coarser distributions, which is
    at most that of the whole ones. (Renormalising the k likeliest, as is often done, would make the model too sure of them.)
    """
    if source.ids_nk is None:
        return kind(log_q_nV, source.log_p_nC)
    others_n1 = _others(log_q_nV, source.ids_nk)
    found_n, gradient_nC = kind(torch.cat([log_q_nV.gather(1, source.ids_nk), others_n1], -1), source.log_p_nC)
    # the class of all others is a log-sum-exp of their logits: each gets its share of the class' gradient
    gradient_nV = (log_q_nV - others_n1).exp_().mul_(gradient_nC[:, -1:])
    return found_n, gradient_nV.scatter_(1, source.ids_nk, gradient_nC[:, :-1])


def _others(log_p_nV: Tensor, ids_nk: Tensor) -> Tensor:
    """Log-probability [n, 1] of all tokens but these; from the tokens themselves, as one minus a sum near one has no digits."""
    return log_p_nV.scatter(1, ids_nk, -torch.inf).logsumexp(-1, keepdim=True)


class Distillation:
    """The objective of a stage that learns from its source.

    loss = text * cross-entropy + share(step) (logits * temperature^2 * divergence + hidden * distance + blocks * mean distance),
    where share rises from 0 to 1 over the warm-up.
    """

    def __init__(self, config: DistillConfig, source: Source, states: States | None, steps: int, document_end: int | None = None) -> None:
        """`states`: of the model in training, of those that `config.states` names; `steps`: of the stage."""
        self._config, self._source, self._states, self._document_end = config, source, states, document_end
        self._kind, self._rise = DIVERGENCES[config.divergence], round(config.warmup * steps)

    def share(self, step: int) -> float:
        """Share of the weights of all but the text at a step, counted from 1."""
        return 1.0 if self._rise == 0 else min(1.0, step / self._rise)

    def __call__(self, model: nn.Module, ids_BT: Tensor, step: int) -> dict[str, Tensor]:
        """Values [B, T - 1]: `loss`, and its terms in nats or as distances, unweighted: `text`, `logits`, `hidden`, `blocks`."""
        config, share = self._config, self.share(step)
        predictions, expected = self._source(ids_BT)
        if self._states is not None:
            self._states.begin()
        logits_BTV: Tensor = model(**model_inputs(ids_BT, self._document_end)).logits
        found = self._states.end() if self._states is not None else {}
        labels_N, weight = next_tokens(ids_BT), share * config.logits

        def terms(rows: slice, logits_nV: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
            labels_n = labels_N[rows]
            log_q_nV = logits_nV.log_softmax(-1)
            if not weight:
                text_n, gradient_nV = text_loss(log_q_nV, labels_n, wanted)
                return torch.stack([config.text * text_n, text_n]), None if gradient_nV is None else gradient_nV.mul_(config.text)
            heat = config.temperature
            cooler_nV = log_q_nV if heat == 1 else (logits_nV / heat).log_softmax(-1)
            apart_n, gradient_nV = divergence(cooler_nV, predictions(rows), self._kind)
            predicts_n = labels_n >= 0
            apart_n, gradient_nV = apart_n * predicts_n * heat**2, gradient_nV.mul_((weight * heat * predicts_n)[:, None])
            text_n, of_text_nV = text_loss(log_q_nV, labels_n, wanted and config.text > 0)
            if of_text_nV is not None:
                gradient_nV.add_(of_text_nV, alpha=config.text)
            return torch.stack([config.text * text_n + weight * apart_n, text_n, apart_n]), gradient_nV if wanted else None

        loss_BT, others_KBT = row_losses(logits_BTV, terms)
        named = {"loss": loss_BT, **dict(zip(("text", "logits") if weight else ("text",), others_KBT, strict=True))}
        for name in config.states:
            apart_BT = projected(model, name, found, expected, config.state_distance)[:, :-1]
            named["loss"] = named["loss"] + share * getattr(config, name) * apart_BT
            named[name] = apart_BT.detach()
        return named
