"""SRAE: a sparse reconstruction autoencoder that explains a class's score by a few x-features.

For a vector Z of the layer (a map is averaged over its grid), scaled by one number, and class scores y of the network,
standardised over the fit images::

    x = E(Z)        D - 800 - 100 - n, ReLU after every layer (x >= 0)
    Z~ = D(x)       n - 100 - 800 - D, ReLU (the last one only where the layer is never negative)
    y~ = V x + b
    loss = a_p mean (y~ - y)^2  +  a_r (1/D) sum_k log(1 + q m_k)  +  a_t PT  +  (decay / 2) |parameters|^2

m_k is the batch's mean squared error of feature k: the logarithm lets the decoder give up on features that it cannot
rebuild. PT is the pull-away term, the mean squared cosine of pairs of x-features over the batch (``features``) or of
images over x-features (``images``). The contribution of x-feature l to class c is c_l = v_cl x_l; they and the bias
add up to y~.

Every class has a module of its own; all are trained side by side in one batched model, each as if it were alone.
``joint`` makes one module for all classes. An attempt is 3/17 of its steps greedy pre-training of the three layer
pairs, 1/17 the linear head, and the rest joint training with a tenth of the learning rate after 40, 80 and 120 of 130
parts. It is accepted if, over the fit images, at least two x-features contribute on average above zero and the second
at least 0.3 of the first; otherwise it is tried again with a_r times 1.2 and a_t times 0.8. ``notes`` tell how often.
A joint module is accepted if half of its classes pass.

Sources: Qi, Khorram & Fuxin, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence 292, 2021
(arXiv 1709.05360); Hamidi-Haines et al., arXiv 1812.07150; the published training code for widths, weights, schedule
and the restart rule. Ours: scaled Z and standardised y (a_p = 40 stands for the published 1 at the logit variance of
that code's data), positives in every batch, and the repair: before the head and before joint training, x-features
that are zero on all positives are drawn anew so that they are on for half of them, and once more early in joint
training in modules where all are. Left out: convolutional
autoencoders.

Shape letters: B images, D features of the layer, K concepts, G modules, N x-features of a module, C classes of
a module.
"""

from __future__ import annotations

import bisect
from typing import Literal, cast

import torch
from torch import Tensor, nn

from netgloss.explainers._class_scores import ClassScores, decisions
from netgloss.explainers._srae_config import SRAEConfig, class_name
from netgloss.explainers._srae_modules import (
    Linears,
    Modules,
    contribution_table,
    faith,
    pull_away,
    sparse_reconstruction,
    squared_error,
)
from netgloss.explainers.base import Batch, LayerSpec, Rows

_PAIRS, _HEAD, _JOINT = 3, 3, 4  # stages: three layer pairs, the head, all together
_MAX_BALANCE = 0.8


class SRAE(ClassScores):
    """Sparse reconstruction autoencoders (module docstring). Concept ``g * n + l`` is x-feature l of module g.

    ``decode`` gives the mean of the modules' reconstructions; ``decode_modules`` gives each.

    Attributes
    ----------
    class_index : (classes,) indices of the explained classes.
    scale, target_mean, target_sd : buffers () and (classes,): what Z and y are divided by.
    tries, accepted : buffers (G,): attempts judged, and whether the module passed.
    notes : plain sentences about the last fit.

    Raises
    ------
    UserError : no or unknown classes; a class without images; constant scores; a store without logits.
    """

    Config = SRAEConfig
    learned = True
    config: SRAEConfig
    scale: Tensor
    target_mean: Tensor
    target_sd: Tensor
    tries: Tensor
    accepted: Tensor
    weight_rebuild: Tensor
    weight_pull: Tensor
    seed: Tensor

    def __init__(self, config: SRAEConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        total = len(self.class_index)
        self.num_modules = 1 if config.joint else total
        self.nets = Modules(
            self.num_modules,
            spec.num_features,
            config.num_concepts,
            total // self.num_modules,
            rectified=spec.nonnegative,
        )
        count = self.num_modules
        buffers = {
            "scale": torch.ones(()),
            "target_mean": torch.zeros(total),
            "target_sd": torch.ones(total),
            "tries": torch.zeros(count, dtype=torch.long),
            "accepted": torch.zeros(count, dtype=torch.bool),
            "weight_rebuild": torch.full((count,), float(config.weights[1])),
            "weight_pull": torch.full((count,), float(config.weights[2])),
            "seed": torch.zeros((), dtype=torch.long),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self._live = 0.0

    # -- images explained -----------------------------------------------------------------------------------------

    @property
    def num_concepts(self) -> int:
        """K = G n."""
        return self.num_modules * self.config.num_concepts

    def name_concepts(self) -> list[str]:
        """``tench x1``; ``x1`` for a joint module."""
        owners = [""] if self.config.joint else [f"{class_name(text)} " for text in self.config.classes]
        return [f"{owner}x{i + 1}" for owner in owners for i in range(self.config.num_concepts)]

    def encode_rows(self, rows: Tensor) -> Tensor:
        """(B, D) -> x-features (B, K)."""
        x_GBN = self.nets.encode(self._scaled(rows))
        return x_GBN.permute(1, 0, 2).flatten(1)

    def encoder_chain(self, concept: int) -> tuple[nn.Sequential, int]:
        """The encoder (B, D) -> (B, N) of the module that ``concept`` belongs to, a copy, and its place there."""
        g, unit = divmod(concept, self.config.num_concepts)
        layers: list[nn.Module] = []
        for i, wide in enumerate(cast(list[Linears], list(self.nets.encoder))):
            layer = nn.Linear(wide.weight.shape[1], wide.weight.shape[2], device=self.scale.device)
            layer.load_state_dict({"weight": wide.weight[g].T / (1 if i else self.scale), "bias": wide.bias[g, 0]})
            layers += [layer, nn.ReLU()]
        return nn.Sequential(*layers), unit

    def decode_modules(self, concepts: Tensor) -> Tensor:
        """Concepts (B, K) -> the reconstruction of each module, (G, B, D)."""
        return self.nets.decode(self._by_module(concepts)) * self.scale

    def class_weights(self) -> tuple[Tensor, Tensor]:
        """Weights (K, classes) and biases (classes,) of the rebuilt logits, which are affine in the concepts."""
        v_GNC = self.nets.head.weight
        weight_KC = v_GNC[0] if self.config.joint else torch.block_diag(*v_GNC)
        bias_C = self.nets.head.bias.flatten()
        return weight_KC * self.target_sd, bias_C * self.target_sd + self.target_mean

    def _by_module(self, concepts: Tensor) -> Tensor:
        """(B, K) -> (G, B, N)."""
        return concepts.unflatten(1, (self.num_modules, self.config.num_concepts)).permute(1, 0, 2)

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows.to(self.scale.dtype) / self.scale

    # -- the fit --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit_rows(self, rows: Rows, *, seed: int) -> None:
        """Scales of Z and y over the fit images, and initial values that depend on the seed and the class only."""
        self.notes.clear()
        z_ND, y_NC, _ = self.read_fit(rows, seed=seed)
        self.scale.fill_(z_ND.double().square().mean().sqrt())
        self.target_mean.copy_(y_NC.mean(dim=0))
        self.target_sd.copy_(y_NC.std(dim=0, correction=0))
        self.seed.fill_(seed)
        self.tries.zero_()
        self.accepted.zero_()
        self.weight_rebuild.fill_(self.config.weights[1])
        self.weight_pull.fill_(self.config.weights[2])
        for g in range(self.num_modules):
            self.nets.draw(g, self._seed_of(g))

    @property
    def max_steps(self) -> int:
        return self.config.steps * self.config.attempts

    @property
    def balance(self) -> tuple[tuple[int, ...], float]:
        return tuple(self.class_index), min(_MAX_BALANCE, self.config.positives * len(self.class_index))

    def lr_scale(self, step: int) -> float:
        """1, but 0.1, 0.01, 0.001 after 40, 80, 120 of 130 parts of joint training."""
        start = self._starts[_JOINT]
        done = (step % self.config.steps - start) / (self.config.steps - start)
        return 0.1 ** int(max(0.0, done) * 130 / 40)

    @torch.no_grad()
    def before_step(self, step: int, rows: Rows) -> Literal["go", "reset", "stop"]:
        """Judges and restarts at the end of an attempt, repairs at the start of a stage; both reset the optimiser."""
        if self.config.shuffle_logits and self._shuffled is None:  # a fit that continues
            self.read_fit(rows, seed=int(self.seed))
        at = step % self.config.steps
        if at == 0 and step > 0:
            self._judge(rows)
            if self.accepted.all():
                return "stop"
            for g in self._active().tolist():
                self.weight_rebuild[g] *= 1.2
                self.weight_pull[g] *= 0.8
                self.nets.draw(g, self._seed_of(g))
        if self.config.repair and at in self._starts[_HEAD:]:
            self._repair(rows, step)
        elif self.config.repair and at == self._second_look:
            self._repair(rows, step, silent_only=True)
        return "reset" if at in self._starts else "go"

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the stage that ``batch.step`` lies in, summed over the modules in training."""
        z_BD = self._scaled(batch.activation)
        active = self._active() if self.accepted.any() else None
        stage = self._stage(batch.step)
        self.nets.set_decay(self.config.weight_decay if stage == _JOINT else 0.0)
        if stage < _PAIRS:
            with torch.no_grad():
                given = self.nets.encode(z_BD, active, depth=stage) if stage else z_BD
            code = self.nets.encoder[stage](given, active).relu()
            rebuilt = self.nets.decode_layer(2 - stage, code, active)
            return {"pair": (rebuilt - given).square().flatten(1).mean(dim=1).sum()}
        y_BC = (self.targets(batch) - self.target_mean) / self.target_sd
        y_GBC = y_BC[None] if self.config.joint else y_BC.T[:, :, None]
        y_GBC = y_GBC if active is None else y_GBC[active]
        if stage == _HEAD:
            with torch.no_grad():
                x_GBN = self.nets.encode(z_BD, active)
            return {"head": faith(self.nets.head(x_GBN, active), y_GBC).sum()}
        return self._joint_losses(z_BD, y_GBC, active)

    def _joint_losses(self, z_BD: Tensor, y_GBC: Tensor, active: Tensor | None) -> dict[str, Tensor]:
        modules, config = self.nets, self.config
        x_GBN = modules.encode(z_BD, active, dropout=config.dropout if self.training else 0.0)
        self._live = float((x_GBN > 0).any(dim=1).float().sum(dim=1).mean())
        rebuild = self.weight_rebuild if active is None else self.weight_rebuild[active]
        pull = self.weight_pull if active is None else self.weight_pull[active]
        terms = {"faith": config.weights[0] * faith(modules.head(x_GBN, active), y_GBC).sum()}
        if rebuild.any():
            error_GD = squared_error(modules.decode(x_GBN, active), z_BD)
            term_G = (
                sparse_reconstruction(error_GD, config.q)
                if not config.preset.startswith("sae")
                else error_GD.mean(dim=1)
            )
            terms["reconstruction"] = (rebuild * term_G).sum()
        if pull.any():
            head = modules.head.weight if active is None else modules.head.weight[active]
            table_GCBN = contribution_table(x_GBN, head)
            rows = table_GCBN.transpose(-1, -2) if config.preset != "released" else table_GCBN
            terms["pull_away"] = (pull * pull_away(rows).sum(dim=1)).sum()
        return terms

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.config.lr, fused=True)

    def after_step(self, step: int) -> dict[str, float]:
        """Live x-features a module in the last batch."""
        return {"live": self._live}

    @torch.no_grad()
    def after_fit(self, rows: Rows) -> None:
        """Judges the last attempt and notes restarts, refusals and dead x-features."""
        if not self.accepted.all():
            self._judge(rows)
        repeated = int((self.tries > 1).sum())
        if repeated:
            self.notes.append(
                f"{repeated} of {self.num_modules} module(s) were trained again because one x-feature carried nearly "
                f"everything (attempts: {', '.join(map(str, self.tries.tolist()))})"
            )
        refused = [name for name, ok in zip(self._module_names(), self.accepted.tolist(), strict=True) if not ok]
        if refused:
            self.notes.append(
                f"not accepted after {self.config.attempts} attempt(s), one x-feature carries nearly everything: "
                f"{', '.join(refused)}"
            )
        dead = [int((hidden <= 0).all(dim=0).sum()) for hidden in self._positives(rows, 3)]
        told = [f"{name} {count}" for name, count in zip(self._module_names(), dead, strict=True) if count]
        if told:
            count = self.config.num_concepts
            self.notes.append(f"x-features (of {count}) that are zero on all images of their class: {', '.join(told)}")

    # -- restart and repair ---------------------------------------------------------------------------------------

    @property
    def _starts(self) -> list[int]:
        """First step of each stage."""
        return [self.config.steps * k // 17 for k in range(5)]

    def _stage(self, step: int) -> int:
        return bisect.bisect_right(self._starts, step % self.config.steps) - 1

    def _active(self) -> Tensor:
        """(A,) modules that are still to be accepted."""
        return (~self.accepted).nonzero().flatten()

    def _seed_of(self, g: int) -> int:
        owner = self.spec.num_classes if self.config.joint else self.class_index[g]
        return ((int(self.seed) << 24) ^ (owner << 4)) + int(self.tries[g])

    def _module_names(self) -> list[str]:
        return ["the joint module"] if self.config.joint else [class_name(text) for text in self.config.classes]

    def _judge(self, rows: Rows) -> None:
        """Counts an attempt of each module in training and applies the rule of the module docstring."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        weight_KC, _ = self.class_weights()
        for batch in rows.examples():
            total = total.to(self.scale.device) + self.encode_rows(batch.activation.to(self.scale.device)).sum(
                dim=0, dtype=torch.float64
            )
            count += len(batch.activation)
        mean_KC = (total / count)[:, None] * weight_KC.double()
        mean_GNC = mean_KC[None] if self.config.joint else self._blocks(mean_KC)
        top = mean_GNC.sort(dim=1, descending=True).values
        second = top[:, 1] if top.shape[1] > 1 else top[:, 0]  # a single x-feature cannot fail the rule
        passed_GC = (second > 0) & (second >= 0.3 * top[:, 0])
        active = self._active()
        self.tries[active] += 1
        self.accepted[active] = passed_GC.double().mean(dim=1)[active] >= 0.5

    def _blocks(self, table_KC: Tensor) -> Tensor:
        """The rows of each module and the column of its class, (G, N, 1)."""
        n = self.config.num_concepts
        return torch.stack([table_KC[g * n : (g + 1) * n, g, None] for g in range(self.num_modules)])

    def _positives(self, rows: Rows, depth: int) -> list[Tensor]:
        """Each module's encoder output at ``depth`` on the images of its own classes, (P, .)."""
        found: list[list[Tensor]] = [[] for _ in range(self.num_modules)]
        for batch in rows.examples():
            z_BD, decided = self._scaled(batch.activation.to(self.scale.device)), decisions(batch)
            for g in range(self.num_modules):
                own = torch.tensor(self.class_index if self.config.joint else self.class_index[g : g + 1])
                mask = torch.isin(decided, own).to(z_BD.device)
                found[g].append(self.nets.encode(z_BD[mask], torch.tensor([g], device=z_BD.device), depth=depth)[0])
        return [torch.cat(parts) for parts in found]

    @property
    def _second_look(self) -> int:
        """Step of an attempt, 10 of 130 parts into joint training, after which a silent module would stay silent."""
        return self._starts[_JOINT] + (self.config.steps - self._starts[_JOINT]) * 10 // 130

    def _repair(self, rows: Rows, step: int, *, silent_only: bool = False) -> None:
        """Draws x-features anew that are zero on all positives: on for half of them, as strong as the others.

        A hidden layer that says nothing of the positives is drawn anew first. ``silent_only`` leaves modules alone
        whose x-features tell them apart.
        """
        layer = cast(Linears, self.nets.encoder[2])
        hidden = self._positives(rows, 2)
        chosen = self._active().tolist()
        if silent_only:
            codes = self._positives(rows, 3)
            chosen = [g for g in chosen if _is_silent(codes[g])]
        emptied = [g for g in chosen if _is_silent(hidden[g])]
        for depth in (1, 2) if emptied else ():
            found = self._positives(rows, depth)
            for g in emptied:
                if _is_silent(found[g]):
                    generator = torch.Generator().manual_seed(self._seed_of(g) ^ (step << 40) ^ depth)
                    cast(Linears, self.nets.encoder[depth - 1]).draw(g, generator)
        hidden = self._positives(rows, 2) if emptied else hidden
        for g in chosen:
            before = hidden[g] @ layer.weight[g] + layer.bias[g]
            dead = (before <= 0).all(dim=0)
            if not dead.any() or not hidden[g].any():
                continue
            generator = torch.Generator().manual_seed(self._seed_of(g) ^ (step << 40))
            typical = before[:, ~dead].relu().mean() if not dead.all() else before.new_ones(())
            longest = layer.weight[g].norm(dim=0).max().clamp_min(1)
            for i in dead.nonzero().flatten().tolist():
                direction = torch.randn(layer.weight.shape[1], generator=generator).to(before)
                response = hidden[g] @ direction
                wanted = typical / (response - response.median()).relu().mean()
                direction = direction * wanted.clamp_max(longest / direction.norm())
                layer.weight[g, :, i] = direction
                layer.bias[g, 0, i] = -(hidden[g] @ direction).median()
                bound = self.config.num_concepts**-0.5
                for incoming in (cast(Linears, self.nets.decoder[0]).weight[g, i], self.nets.head.weight[g, i]):
                    incoming.copy_(torch.empty(incoming.shape).uniform_(-bound, bound, generator=generator))


def _is_silent(values: Tensor) -> bool:
    """True if no unit (P, .) tells the images apart: all are off, or on by their biases alone."""
    if len(values) < 2:
        return not bool(values.any())
    return bool((values.amax(dim=0) - values.amin(dim=0) <= 1e-6 * values.amax()).all())
