"""Hardens a network in a run folder: arms and seeds, checkpoints, and the evaluation before and after.

::

    hardened-ARM-seedN.safetensors   the network's own state-dict keys: loads with ``--checkpoint``
    hardened-ARM-seedN.json          format version, parent hash, arm, settings, seed, data hashes, versions
    judged-ARM-seedN.json            accuracies by attack, consistency on R and V; judged-original.json the parent's
    result.json                      means and intervals over seeds, checks; run.json, history.jsonl, scores.json

Every attack is regenerated against each network; the transfer images are those of the original. An interrupted command
continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from netgloss.adversarial import PixelClassifier, attack_in_batches, pgd
from netgloss.adversarial.affinity_choice import AffinityChoice
from netgloss.adversarial.arms import ARMS, find_arm
from netgloss.adversarial.harden import DivergedError, HardenConfig, Hardened, Hardening, settings, split_training
from netgloss.adversarial.harden_summary import arm_scores, summarise_arm
from netgloss.adversarial.layer_consistency import LayerResult, UnitOptions, measure_layers
from netgloss.adversarial.pixels import LabelledPixels, load_pixels
from netgloss.adversarial.probe import AttackChoice, attack_probe
from netgloss.adversarial.robustness import Attacked, AttackPlan, masking_failures, robust_accuracies
from netgloss.classifiers import Classifier, load_classifier
from netgloss.classifiers.modules import copied
from netgloss.errors import UserError
from netgloss.metrics.consistency.units import top_set_size
from netgloss.metrics.feature_health import response_correlation
from netgloss.report import write_report
from netgloss.runs.run import FileCheckpoint, Run, in_order, read_json, to_json, versions, write_atomically
from netgloss.training.execution import Execution
from netgloss.trust import check_code

if TYPE_CHECKING:
    from netgloss.data import ImageSource

CHECKPOINT_FORMAT = 1


@dataclass(frozen=True)
class HardenPlan:
    """What is trained and how it is evaluated, in addition to :class:`HardenConfig`."""

    arms: tuple[str, ...] = ("clean", "at", "consistent")
    """Arms to train: clean, noise, at, consistent-only, consistent, pgd-at, pgd-consistent, trades."""
    seeds: int = 3
    """Seeds of each arm, 0, 1, ..."""
    betas: tuple[float, ...] = ()
    """Try these weights of the feature term with the first seed and continue with the one that is best on held-out
    training images; default: --beta as it is."""
    train_images: int | None = None
    """Train on this many images, equally many of every class; default all."""
    probe_images: int | None = None
    """Measure consistency on this many of the evaluation images; default all."""
    attack_images: int | None = 500
    """Attack this many of the evaluation images for the accuracies."""
    k: int | None = None
    """Size of a unit's top set; default the larger of 1 % and 20, at most the smallest class (of 20 images or more)."""
    craft_layer: str | None = None
    """Layer that attacks differentiate instead of the logits (SqueezeNet: classifier.1)."""
    v_steps: int = 20
    """Steps of the targeted PGD that makes V."""

    def __post_init__(self) -> None:
        for arm in self.arms:
            find_arm(arm)
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise UserError(f"arms must be given, and none twice, got {', '.join(self.arms) or 'none'}")
        if self.seeds < 1 or self.v_steps < 1:
            raise UserError(f"seeds and v_steps must be at least 1, got {self.seeds} and {self.v_steps}")


@dataclass(frozen=True)
class _Settings:
    """The options of a hardening."""

    config: HardenConfig
    plan: HardenPlan
    attacks: AttackPlan
    affinity: AffinityChoice

    def record(self) -> dict[str, Any]:
        """What run.json records of them."""
        return {
            **dataclasses.asdict(self.config),
            "plan": dataclasses.asdict(self.plan),
            "attacks": dataclasses.asdict(self.attacks),
            "affinity": {k: None if v is None else str(v) for k, v in dataclasses.asdict(self.affinity).items()},
        }


def harden(
    classifier: Classifier,
    images: ImageSource,
    eval_images: ImageSource,
    *,
    layer: str,
    out: str | Path,
    config: HardenConfig | None = None,
    plan: HardenPlan | None = None,
    attacks: AttackPlan | None = None,
    affinity: AffinityChoice | None = None,
    device: str | Execution = "auto",
) -> Run:
    """Trains every arm of a plan with every seed, evaluates them and the original, and writes the report.

    Parameters
    ----------
    images : to train on (a share of them chooses the epoch and beta). eval_images : R, and what is attacked.
    layer : phi, and the layer whose channels are scored.
    out : the run folder; an interrupted run with the same settings continues.
    device : a device, or an :class:`~netgloss.Execution`.

    Returns
    -------
    The run: ``hardened-ARM-seedN.safetensors`` in its folder load with ``checkpoint=``.

    Raises
    ------
    UserError : images that do not fit the classifier, too few of them, or ``out`` holds another run.
    """
    options = _Settings(
        config or HardenConfig(), plan or HardenPlan(), attacks or AttackPlan(), affinity or AffinityChoice()
    )
    execution = Execution.of(device)
    progress = execution.shown
    classifier.check_layer(layer)
    if images.fingerprint == eval_images.fingerprint:
        raise UserError(
            "the images to evaluate on are those to train on: hardened networks are evaluated on other images"
        )
    classifier = classifier.to("cpu")
    train = load_pixels(classifier, images, number=options.plan.train_images, progress=progress)
    probe = load_pixels(classifier, eval_images, progress=progress)
    both = f"{images.fingerprint}\n{eval_images.fingerprint}\n{classifier.weights_hash}"
    manifest = {
        "command": execution.command,
        "method": "harden",
        "config": options.record(),
        "model": classifier.spec(),
        "layer": layer,
        "seeds": list(range(options.plan.seeds)),
        "store_address": hashlib.sha256(both.encode()).hexdigest(),
        "data": {
            "description": f"{images.description}; judged on {eval_images.description}",
            "num_images": len(train),
            "num_heldout": len(probe),
            "fingerprint": images.fingerprint,
            "eval_fingerprint": eval_images.fingerprint,
            "unreadable": [{"id": i, "reason": r} for i, r in {**train.problems, **probe.problems}.items()][:200],
        },
    }
    run = Run.create(out, manifest)
    job = _Job(run, classifier, train, probe, layer, options, execution)
    began = time.monotonic()
    job.choose_beta()
    job.evaluate("original")
    for done, arm in enumerate(options.plan.arms, start=1):
        for seed in run.seeds:
            job.train_arm(arm, seed)
            job.evaluate(arm, seed)
        job.summarise(options.plan.arms[:done])
    run.add_time("hardening and judging", time.monotonic() - began)
    run.update(status="complete")
    write_report(run)
    return run


class _Job:
    """One harden command at work."""

    def __init__(
        self,
        run: Run,
        classifier: Classifier,
        train: LabelledPixels,
        probe: LabelledPixels,
        layer: str,
        options: _Settings,
        execution: Execution,
    ) -> None:
        self.run, self.classifier, self.train, self.layer = run, classifier, train, layer
        self.config, self.plan, self.attacks = options.config, options.plan, options.attacks
        self.fabric, self.progress = execution.fabric, execution.shown
        self.probe = probe.stratified(self.plan.probe_images)
        self.attacked = probe.stratified(self.plan.attack_images)
        top_set_size(self.probe.probe_labels, k=self.plan.k)  # refuses too few images before anything is trained
        split_training(train, self.config.holdout)
        self.affinities, self.provenance = options.affinity.build(classifier, self.probe)
        self._transfer: Tensor | None = None
        self._before: tuple[LayerResult, float] | None = None

    # -- training -------------------------------------------------------------------------------------------------

    def choose_beta(self) -> None:
        """Tries ``betas`` with the first seed on the training images alone; the choice is kept in run.json."""
        feature_arms = [arm for arm in self.plan.arms if ARMS[arm].features]
        if not self.plan.betas or not feature_arms:
            return
        arm = "consistent" if "consistent" in feature_arms else feature_arms[0]
        tried = dict(self.run.manifest.get("betas_tried", {}))
        for beta in self.plan.betas:
            if str(beta) not in tried:
                config = dataclasses.replace(self.config, beta=beta)
                try:
                    tried[str(beta)] = self._harden(arm, 0, config, f"-beta{beta:g}").selection
                except DivergedError as error:
                    tried[str(beta)] = None
                    self.progress.say(str(error))
                self.run.update(betas_tried=tried)
                self._checkpoint(arm, 0, f"-beta{beta:g}").remove()
        stable = [beta for beta in self.plan.betas if tried[str(beta)] is not None]
        if not stable:
            raise UserError(f"the loss became NaN or Inf with every beta of {self.plan.betas}: lower --lr")
        best = max(stable, key=lambda beta: tried[str(beta)])
        self.config = dataclasses.replace(self.config, beta=best)
        self.run.update(beta_chosen=best)

    def train_arm(self, arm: str, seed: int) -> None:
        """Trains one arm with one seed, unless its checkpoint is there already."""
        if self._weights(arm, seed).exists():
            return
        found = self._harden(arm, seed, self.config)
        self._save(found, arm, seed)
        self._checkpoint(arm, seed).remove()

    def _harden(self, arm: str, seed: int, config: HardenConfig, mark: str = "") -> Hardened:
        checkpoint = self._checkpoint(arm, seed, mark)
        saved = checkpoint.load()
        self.run.trim_history(seed, 0 if saved is None else int(saved[1]["step"]), arm=arm + mark)
        arm_of = Hardening(self.classifier, self.train, self.layer, arm, config, seed, self.plan.craft_layer)
        return arm_of.run(
            fabric=self.fabric,
            checkpoint=checkpoint,
            log=lambda line: self.run.log({**line, "arm": arm + mark}),
            progress=self.progress,
        )

    def _save(self, found: Hardened, arm: str, seed: int) -> None:
        from safetensors.torch import save

        record = {
            "format_version": CHECKPOINT_FORMAT,
            "parent": self.classifier.origin,
            "parent_hash": self.classifier.weights_hash,
            **settings(self.config, arm=arm, layer=self.layer, seed=seed),
            "data": self.run.manifest["data"],
            "num_train": len(self.train),
            "best_epoch": found.best_epoch,
            "switched": found.switched,
            "checks": found.checks,
            "warnings": found.warnings,
            "versions": versions(),
        }
        state = {name: value.contiguous() for name, value in found.net.state_dict().items()}
        path = self._weights(arm, seed)
        write_atomically(path.with_suffix(".json"), to_json(record))
        write_atomically(path, in_order(save(state, metadata={"arm": arm, "seed": str(seed)})))

    def _weights(self, arm: str, seed: int) -> Path:
        return self.run.path / f"hardened-{arm}-seed{seed}.safetensors"

    def _checkpoint(self, arm: str, seed: int, mark: str = "") -> FileCheckpoint:
        return FileCheckpoint(self.run.path / f"harden-{arm}{mark}-seed{seed}.checkpoint.safetensors")

    # -- evaluating -----------------------------------------------------------------------------------------------

    def _pixels(self, arm: str, seed: int) -> PixelClassifier:
        net = copied(self.classifier.net).to(memory_format=torch.channels_last)
        if arm != "original":
            from netgloss.classifiers.checkpoints import load_weights, read_checkpoint

            path = self._weights(arm, seed)
            load_weights(net, read_checkpoint(path), source=path)
        spec = self.classifier.preprocessing
        pixels = PixelClassifier(net.eval(), spec.mean, spec.std, craft_layer=self.plan.craft_layer)
        return pixels.to(self.fabric.device)

    def transfer(self) -> Tensor:
        """Untargeted PGD images of the attacked set, made against the original."""
        if self._transfer is None:
            x, y = self.attacked.pixels(), self.attacked.labels
            pixels = self._pixels("original", 0)
            options: dict[str, Any] = {"eps": self.config.eps / 255, "steps": self.attacks.attack_steps, "restarts": 1}
            x, y = x.to(self.fabric.device), y.to(self.fabric.device)
            self._transfer = attack_in_batches(pgd, pixels, x, y, ids=self.attacked.ids, seed=7, **options).images
        return self._transfer

    def before(self) -> tuple[LayerResult, float]:
        """Consistency of the original, and the share of its V that reached its target."""
        if self._before is None:
            self._before = self._consistency(self._pixels("original", 0), 0)
        return self._before

    def _consistency(self, pixels: PixelClassifier, seed: int) -> tuple[LayerResult, float]:
        """Of the layer's channels, with V regenerated; and the share of V that reached its target."""
        choice = AttackChoice("pgd", eps=self.config.eps, steps=self.plan.v_steps)
        adversarial = attack_probe(pixels, self.probe, choice, seed=seed)
        assert adversarial is not None
        results, _ = measure_layers(
            pixels,
            self.probe,
            [self.layer],
            self.affinities,
            adversarial=adversarial,
            options=UnitOptions(k=self.plan.k, null_draws=0, seed=seed),
        )
        return results[self.layer], float(adversarial.found.success.float().mean())

    def evaluate(self, arm: str, seed: int = 0) -> None:
        """Attacks a network and scores its channels, unless that is done already."""
        name = "original" if arm == "original" else f"{arm}-seed{seed}"
        path = self.run.path / f"judged-{name}.json"
        if path.exists():
            return
        pixels = self._pixels(arm, seed)
        images = Attacked(
            self.attacked.pixels().to(self.fabric.device),
            self.attacked.labels.to(self.fabric.device),
            self.attacked.ids,
            self.attacked.net_classes.tolist(),
            self.transfer(),
        )
        accuracies = robust_accuracies(
            pixels,
            images,
            eps=self.config.eps / 255,
            plan=self.attacks,
            layer=self.layer,
            seed=seed,
            progress=self.progress,
        )
        original, _ = self.before()
        result, reached = self.before() if arm == "original" else self._consistency(pixels, seed)
        assert result.comparison is not None
        failures = masking_failures(
            accuracies, steps=self.attacks.attack_steps, long_steps=self.attacks.long_steps or 100
        )
        same = len(result.units) == len(original.units)
        correlation = response_correlation(original.real, result.real) if same else torch.tensor([math.nan])
        record = {
            "arm": arm,
            "seed": seed,
            "accuracies": accuracies,
            "masking": failures,
            "consistency": result.summary(),
            "reached_target": reached,
            "response_correlation": float(correlation.nanmean()),
            "calibrated": {
                part: getattr(result.comparison, part).calibrated.tolist() for part in ("real", "adversarial", "union")
            },
            "random": {part: values.tolist() for part, values in result.random.items()},
            "bins": result.bins,
        }
        write_atomically(path, to_json(record))

    # -- summary --------------------------------------------------------------------------------------------------

    def summarise(self, finished: Sequence[str]) -> None:
        """result.json and scores.json from the evaluations of these arms."""
        seeds = self.run.seeds
        records = {
            (arm, seed): read_json(self.run.path / f"judged-{arm}-seed{seed}.json")
            for arm in finished
            for seed in seeds
        }
        original = read_json(self.run.path / "judged-original.json")
        table = {"original": [original], **{arm: [records[arm, s] for s in seeds] for arm in finished}}
        arms = {arm: summarise_arm(found) for arm, found in table.items()}
        hardened = {
            f"{arm} seed {seed}": read_json(self._weights(arm, seed).with_suffix(".json")) for arm, seed in records
        }
        failures = [f"{arm}: {line}" for arm, found in table.items() for r in found for line in r["masking"]]
        warnings = [f"{name}: {line}" for name, record in hardened.items() for line in record["warnings"]]
        result = {
            "settings": self.run.manifest["config"],
            "beta": self.config.beta,
            "betas_tried": self.run.manifest.get("betas_tried", {}),
            "affinity": self.provenance,
            "seeds": list(seeds),
            "num_train": len(self.train),
            "num_probe": len(self.probe),
            "num_attacked": len(self.attacked),
            "class_names": self.probe.class_names,
            "training_attack": {arm: ARMS[arm].crafting for arm in finished},
            "v_regenerated": True,
            "arms": arms,
            "masking": failures,
        }
        write_atomically(self.run.path / "result.json", to_json(result))
        self.run.update(warnings=[*failures, *warnings])
        main = "consistent" if "consistent" in finished else finished[-1]
        self.run.write_scores(arm_scores(table, main, len(self.attacked), len(self.probe)))


def load_hardened(run: Run, arm: str, seed: int = 0) -> Classifier:
    """A hardened network of a run as a classifier, loaded like any other checkpoint.

    Raises
    ------
    UserError : the run names a Python file that the user has neither named nor allowed.
    """
    spec = run.manifest["model"]
    check_code(spec["name"], f"the run {run.path}")
    return load_classifier(
        spec["name"],
        checkpoint=run.path / f"hardened-{arm}-seed{seed}.safetensors",
        num_classes=spec["num_classes"],
        class_names=spec["class_names"],
        preprocessing=spec["preprocessing"],
    )
