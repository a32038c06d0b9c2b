"""The method in one function, to be read from top to bottom: the executable specification of `shearling.run`.

Targeted structured pruning (section 2.1) and dynamic batch loading (section 2.2) of Sheared LLaMA, arXiv 2310.06694, as the
stages `prune` and `train` of a run do them; a test holds both to the same loss at every step. fp32 on the CPU, Taylor start,
projected constraint, hard-concrete gates without noise. Left out is what a run needs beyond the method: checkpoints, logs, checks, GPUs.

Shapes: L layers, D channels of the residual stream, G key/value heads, Q query heads in each, H channels of a head, M neurons,
R sequences, T tokens. A vector of gates is the last dimension of a tensor of gates.
"""

import argparse
import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM

from shearling.arch.families import anatomy_of
from shearling.data.order import sample_indices
from shearling.data.tokens import open_tokens
from shearling.shapes import Target, target_anatomy

GAMMA, ZETA, BETA = -0.1, 1.1, 2 / 3  # of the hard-concrete distribution (Louizos et al., arXiv 1712.01312)
EDGE = BETA * math.log(-GAMMA / ZETA)  # P(z > 0) = sigmoid(logit - EDGE) under the paper's noise
LIMIT = math.log(100.0)  # where logits are clamped for the count, and where the most important gates start


def token_losses(model, ids):
    """Cross-entropy [R, T - 1] of every token of `ids` [R, T] after the first, in nats."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


@torch.no_grad()
def heldout_losses(model, tokens, batch_size):
    """Mean held-out loss of every domain, in nats per token."""
    model.eval()
    rows = [torch.from_numpy(tokens.sequences(name, "heldout")[:].astype(np.int64)) for name in tokens.domains]
    losses = [torch.cat([token_losses(model, ids) for ids in row.split(batch_size)]).double().mean() for row in rows]
    model.train()
    return np.array(losses)


def draw_batch(tokens, n, seed, step, weights, cursors):
    """Ids [n, T] of a step, each from a domain drawn by `weights`, and how far every domain has been read then."""
    uniform = np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64))).random(n)
    domain_of = np.searchsorted(np.cumsum(weights) / np.sum(weights), uniform, side="right")
    ids = np.empty((n, tokens.sequence_length), dtype=np.int64)
    for number, name in enumerate(tokens.domains):
        rows, mine = tokens.sequences(name, "train"), domain_of == number
        ids[mine] = rows[sample_indices(cursors[number] + np.arange(mine.sum()), len(rows), seed, name)]
    return torch.from_numpy(ids), cursors + np.bincount(domain_of, minlength=len(cursors))


def take_gradients(model, gates, ids, microbatches, limit):
    """Mean loss of a step's sequences `ids` [R, T]; its gradients are then in `.grad`, those of the weights clipped to the norm `limit`.

    Gradients are added within each pair of microbatches, then over the pairs: two processes that have one of each pair come to
    the same bits.
    """
    weights, losses = list(model.parameters()), []
    sums = [0.0] * len(weights + gates)
    for number, chunk in enumerate(ids.chunk(microbatches), 1):
        losses.append(token_losses(model, chunk))
        (losses[-1].sum() / ids[:, 1:].numel()).backward()
        if number % 2 == 0 or number == microbatches:
            for i, parameter in enumerate(weights + gates):
                sums[i], parameter.grad = sums[i] + parameter.grad, None
    for parameter, gradient in zip(weights + gates, sums, strict=True):
        parameter.grad = gradient
    norm = torch.stack([w.grad.norm(dtype=torch.float64).square() for w in weights]).sum().sqrt().float().item()
    if norm > limit:
        for w in weights:
            w.grad.mul_(limit / norm)
    return torch.cat(losses).mean(1).double().mean().item()


def shear(source_dir, data_dir, target, *, prune, train, mixture, shares=None, eval_batch=8, seed=17, out=None) -> list[float]:
    """Shear a Hugging Face directory to `target` (sizes by config field) on what `shearling prepare` made; the loss of every step.

    `prune`, `train` and `mixture` are those sections of a recipe as plain values, with every field. `shares`: {domain: starting
    share}, equal if left out. `out`: where the result is saved.
    """
    rule = prune["gates"]
    fields = ("kind", "start", "constraint", "shared_second_moment", "noise", "final_noise")
    chosen = (*(rule[field] for field in fields), mixture["update"])
    if chosen != ("hard_concrete", "scores", "projected", True, 0.0, 0.0, "paper"):
        raise ValueError(f"only the defaults of {', '.join(fields)} and the mixture's update are written out here, not {chosen}")
    steps, history = prune["steps"], []
    model = AutoModelForCausalLM.from_pretrained(source_dir, dtype=torch.float32)
    anatomy = anatomy_of(model.config.to_dict())
    have, want = anatomy.sizes, target_anatomy(anatomy, Target(**target)).sizes
    tokens = open_tokens(data_dir)
    weights = np.array([shares[name] if shares else 1.0 for name in tokens.domains])
    weights, cursors = weights / weights.sum(), np.zeros(len(weights), dtype=np.int64)

    # Gates (section 2.1): a number z in [0, 1] on every unit of every axis that shrinks; the other axes stay open. The paper's
    # are z_layer, z_hidden, z_head and z_int; in the place of z_head ours has key/value heads and the query heads in each, so that
    # grouped-query attention needs nothing special.
    L, D, G, Q, H, M = (have[axis] for axis in ("layer", "hidden", "group", "query", "head_dim", "neuron"))
    z = {"layer": torch.ones(L), "hidden": torch.ones(D), "group": torch.ones(L, G), "query": torch.ones(L, G, Q)}
    z["neuron"] = torch.ones(L, M)
    gated = [axis for axis in z if want[axis] < have[axis]]
    log_alpha, schedule, factor = {}, {}, {}  # {axis: logits, of the shape of z}; where the schedule stands; {place: what it multiplies}

    def gates_from_logits(module, args):
        """z of this forward pass, and what every place of the model multiplies."""
        for axis, alpha in log_alpha.items():
            # The constraint (section 2.1, the Lagrangian terms). The paper drives every vector's expected count to a scheduled one by
            # lambda (s - t) + phi (s - t)^2 with learned multipliers. Ours is their limit: all logits of a vector are shifted
            # by the one number that gives exactly the scheduled size, found by bisection, and divided by a falling temperature.
            # The size goes from the expected count P(z > 0), scaled so that finished gates count 1 or 0, to the gates' own sum.
            closed, opened = (1 / (1 + math.exp(EDGE - side)) for side in (-LIMIT, LIMIT))
            wanted, temperature = have[axis] - (have[axis] - want[axis]) * schedule["progress"], schedule["temperature"]
            with torch.no_grad():
                reach = float(alpha.abs().max()) + (LIMIT + 1.0) * temperature
                low, high = torch.full_like(alpha[..., :1], -reach), torch.full_like(alpha[..., :1], reach)
                for _ in range(40):
                    middle = (low + high) / 2
                    logits = (alpha - middle) / temperature
                    likely = (torch.sigmoid(logits.clamp(-LIMIT, LIMIT) - EDGE) - closed) / (opened - closed)
                    gates = (torch.sigmoid(logits / BETA) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)
                    count = torch.lerp(likely, gates, schedule["settled"]).sum(-1, keepdim=True)
                    low, high = torch.where(count > wanted, middle, low), torch.where(count > wanted, high, middle)
            logits = (alpha - (low + high) / 2) / temperature
            # The hard-concrete gate (Louizos et al., equations 10 and 11) at its median; the paper draws it with noise. At logits beyond
            # EDGE and -EDGE it is exactly 0 and 1, and has no gradient.
            z[axis] = (torch.sigmoid(logits / BETA) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)
        factor["residual"] = (z["layer"][:, None] * z["hidden"]).unbind(0)
        factor["heads"] = (z["group"][:, :, None] * z["query"]).flatten(1).repeat_interleave(H, dim=1).unbind(0)
        factor["neurons"] = z["neuron"].unbind(0)
        # Closed channels are 0 all along the stream, and a norm must take its mean over the n open ones, as the cut model will:
        # x / sqrt(sum(x^2)/D + eps n/D) * sqrt(n/D) = x / sqrt(sum(x^2)/n + eps). The paper's code masks its norms likewise.
        factor["norm"] = ((z["hidden"].detach() != 0).sum(dtype=torch.float32) / D).sqrt()

    epsilon = model.model.norm.variance_epsilon
    norms = [model.model.norm, *(norm for b in model.model.layers for norm in (b.input_layernorm, b.post_attention_layernorm))]
    hooks = [model.register_forward_pre_hook(gates_from_logits)]
    hooks += [model.model.embed_tokens.register_forward_hook(lambda m, args, y: y * z["hidden"])]
    for norm in norms:
        hooks += [norm.register_forward_pre_hook(lambda m, args: setattr(m, "variance_epsilon", epsilon * factor["norm"].square()))]
        hooks += [norm.register_forward_hook(lambda m, args, y: y * factor["norm"])]
    for i, block in enumerate(model.model.layers):
        for name, module in (("heads", block.self_attn.o_proj), ("neurons", block.mlp.down_proj)):
            hooks += [module.register_forward_pre_hook(lambda m, args, name=name, i=i: (args[0] * factor[name][i],))]
            hooks += [module.register_forward_hook(lambda m, args, y, i=i: y * factor["residual"][i])]

    # Reference losses (section 2.2). The paper predicts those of a model of the target's size by a scaling law, or takes the source's.
    reference = mixture["reference"]
    source_losses = heldout_losses(model, tokens, eval_batch)
    reference = source_losses if reference == "source" else np.array([reference[name] for name in tokens.domains])

    # Start. The paper opens all gates alike; ours start by rank of first-order Taylor importance, the mean over pairs of sequences of
    # |dL/dz| at z = 1 (Molchanov et al., arXiv 1611.06440), from `start_low` to the limit: all open, the least important nearest to 0.
    ids, _ = draw_batch(tokens, rule["calibration_sequences"], seed, 0, weights, cursors)
    scores = {axis: torch.zeros_like(z[axis]) for axis in gated}
    for pair in ids.split(2):
        z.update({axis: torch.ones_like(z[axis]).requires_grad_() for axis in gated})
        slopes = torch.autograd.grad(token_losses(model, pair).mean(), [z[axis] for axis in gated])
        for axis, slope in zip(gated, slopes, strict=True):
            scores[axis] += slope.abs()
    for axis in gated:
        rank = scores[axis].argsort(dim=-1, stable=True).argsort(dim=-1, stable=True) / max(have[axis] - 1, 1)
        log_alpha[axis] = (rule["start_low"] + (LIMIT - rule["start_low"]) * rank).requires_grad_()
    first, second = ({axis: torch.zeros_like(alpha) for axis, alpha in log_alpha.items()} for _ in range(2))
    gate_rate = 2 * LIMIT / max(steps, 1) if rule["learning_rate"] is None else rule["learning_rate"]

    # Pruning (section 2.1): weights and gates descend on the same loss, min over both of L(weights, z) subject to the constraint.
    optimizer = torch.optim.AdamW(model.parameters(), betas=prune["betas"], weight_decay=prune["weight_decay"], fused=True)
    warmup, ramp = round(prune["warmup"] * steps), round(rule["ramp"] * steps)
    for step in range(1, steps + 1):
        schedule["progress"] = min(1.0, step / ramp) if ramp else 1.0
        schedule["settled"] = min(1.0, max(0.0, 5.0 * step / steps - 4.0))  # 0 until the last fifth of the steps, 1 at the end
        schedule["temperature"] = rule["temperature"] * (rule["final_temperature"] / rule["temperature"]) ** (step / steps)
        ids, cursors = draw_batch(tokens, prune["batch_size"], seed, step, weights, cursors)
        history.append(take_gradients(model, list(log_alpha.values()), ids, prune["microbatches"], prune["clip"]))
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
        floor = prune["final_learning_rate"]
        optimizer.param_groups[0]["lr"] = prune["learning_rate"] * (step / warmup if step <= warmup else floor + (1 - floor) * cosine)
        optimizer.step()
        optimizer.zero_grad()
        # The gates' Adam. The paper has a plain one at a rate of 1; ours shares the second moment inside a vector, so that a vector's
        # gradients keep their proportions, and its rate falls with the temperature, which magnifies every move of a logit.
        floor = rule["final_learning_rate"]
        rate = gate_rate * ((step / warmup if step <= warmup else floor + (1 - floor) * cosine) * schedule["temperature"])
        with torch.no_grad():
            for axis, alpha in log_alpha.items():
                first[axis].lerp_(alpha.grad, 1 - 0.9)
                second[axis].lerp_(alpha.grad.square().mean(-1, keepdim=True).expand_as(alpha), 1 - 0.95)
                update = first[axis] / (1 - 0.9**step) / ((second[axis] / (1 - 0.95**step)).sqrt() + 1e-12)
                alpha.add_(update, alpha=-rate)
                alpha.grad = None
        print(f"prune {step} {history[-1]:.6f}")
        # Dynamic batch loading (section 2.2, algorithm 1): a domain whose loss is above its reference gets more of what follows. A
        # part `smoothing` is shared out evenly (DoReMi, arXiv 2305.10429), as in the paper's code, so that no domain dies out.
        if step % prune["evaluate_every"] == 0 or step == steps:
            excess = np.maximum(heldout_losses(model, tokens, eval_batch) - reference, 0.0)
            weights = weights * np.exp(mixture["step_size"] * excess)
            weights = (1 - mixture["smoothing"]) * weights / weights.sum() + mixture["smoothing"] / len(weights)

    # Hardening: in every vector exactly the target's number of units is kept, those of the largest logits. In the paper, too.
    for axis, alpha in log_alpha.items():
        z[axis] = torch.zeros_like(alpha).scatter_(-1, alpha.detach().topk(want[axis], dim=-1).indices, 1.0).detach()
    log_alpha.clear()
    with torch.no_grad():
        masked = model(input_ids=ids[:2], use_cache=False).logits
    for hook in hooks:
        hook.remove()

    # Cutting: each dimension of each weight is cut to the open units of the axis that it spans. After the pass above `factor` holds
    # them as 0 and 1 for every place, heads already by their channels.
    layers, hidden, everything = z["layer"].nonzero()[:, 0].tolist(), z["hidden"] > 0, slice(None)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = want["layer"], want["hidden"], want["neuron"]
    config.num_key_value_heads, config.num_attention_heads, config.head_dim = want["group"], want["group"] * want["query"], H
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    cut = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    trained = dict(model.named_parameters())
    for name, parameter in cut.named_parameters():
        if name.startswith("model.layers."):  # for one "model.layers.3.self_attn.q_proj.weight"
            number, kind = name.split(".")[2], name.split(".")[-2]
            layer = layers[int(number)]
            heads, neurons, keys = factor["heads"][layer] > 0, factor["neurons"][layer] > 0, z["group"][layer].repeat_interleave(H) > 0
            rows = {"q_proj": heads, "k_proj": keys, "v_proj": keys, "gate_proj": neurons, "up_proj": neurons}
            rows |= {"q_norm": everything, "k_norm": everything}  # they span the channels of one head
            columns = {"o_proj": heads, "down_proj": neurons}
            kept = trained[name.replace(number, str(layer), 1)].detach()[rows.get(kind, hidden)]
            kept = kept[:, columns.get(kind, hidden)] if kept.ndim == 2 else kept
        else:  # embedding and head [vocab, D], last norm [D]
            kept = trained[name].detach()[..., hidden]
        assert kept.shape == parameter.shape, name
        parameter.data = kept.contiguous()
    with torch.no_grad():  # the cut model computes what the gated one did
        found = cut(input_ids=ids[:2], use_cache=False).logits
    assert (found - masked).abs().max() <= 1e-4 * (masked.max() - masked.min())

    # Continued pretraining (section 2.2): the same without gates. Data go on where pruning stopped, and the shares move before the
    # first step already, by the cut model's losses.
    optimizer = torch.optim.AdamW(cut.parameters(), betas=train["betas"], weight_decay=train["weight_decay"], fused=True)
    warmup, floor = round(train["warmup"] * train["steps"]), train["final_learning_rate"]
    for step in range(train["steps"] + 1):
        if step:
            ids, cursors = draw_batch(tokens, train["batch_size"], seed, steps + step, weights, cursors)
            history.append(take_gradients(cut, [], ids, train["microbatches"], train["clip"]))
            cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, train["steps"] - warmup)))
            optimizer.param_groups[0]["lr"] = train["learning_rate"] * (step / warmup if step <= warmup else floor + (1 - floor) * cosine)
            optimizer.step()
            optimizer.zero_grad()
            print(f"train {step} {history[-1]:.6f}")
        if step % train["evaluate_every"] == 0 or step == train["steps"]:
            excess = np.maximum(heldout_losses(cut, tokens, eval_batch) - reference, 0.0)
            weights = weights * np.exp(mixture["step_size"] * excess)
            weights = (1 - mixture["smoothing"]) * weights / weights.sum() + mixture["smoothing"] / len(weights)
    if out is not None:
        cut.save_pretrained(out)
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Do the pruning and training of a run again, step by step, from its recipe and its data.")
    parser.add_argument("run", type=Path, help="a run directory, with recipe.yaml and data/")
    parser.add_argument("--out", help="where to save the result")
    given = parser.parse_args()
    recipe = yaml.safe_load((given.run / "recipe.yaml").read_text())
    sections = {name: recipe[name] for name in ("prune", "train", "mixture", "seed")}
    given_shares = {name: domain["weight"] or 1.0 for name, domain in recipe["data"]["domains"].items()}
    size = recipe["evaluate"]["batch_size"]
    shear(recipe["source"], given.run / "data", recipe["target"], **sections, shares=given_shares, eval_batch=size, out=given.out)
