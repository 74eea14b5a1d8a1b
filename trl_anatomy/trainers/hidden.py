"""Hooks that edit hidden states and gradients while a training step lasts: its forward, and all of its backward.

Under gradient checkpointing layers run again in the backward pass; edits that end with the forward would silently give
wrong gradients. Nothing is edited outside a training step, but for what a reward model is to keep.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AnatomyError
from ..ops.project_out import project_out
from ..reading.locate import layer_module, residual_dimension
from ..reading.removal import Removal, output_hook
from ..reading.scorers.reft import ends_of
from ..shaping.hidden import (
    Ablation,
    GradientProjection,
    HiddenEdit,
    LowRankSteering,
    Projection,
    Steering,
    orthonormal,
)
from .seams import POLICY, RESPONSE, START, STEERING


def check_hidden(rules: Sequence[Any], config: Any, peft_config: Any) -> None:
    """Refuse what hooks cannot do exactly, before anything long runs.

    Args:
        rules: interventions of a policy.
        config: the trainer's config.
        peft_config: as given to the trainer.

    Raises:
        AnatomyError: naming the option and the verb.
    """
    hidden = [rule for rule in rules if rule.stage == "hidden"]
    if not hidden:
        return
    verb = hidden[0].verb
    if config.torch_compile:
        raise AnatomyError(
            f"torch_compile is set together with {verb}: a compiled model ignores hooks that come after its first "
            "call; leave torch_compile out."
        )
    if getattr(peft_config, "is_prompt_learning", False):
        raise AnatomyError(
            f"peft_config is a prompt-learning one together with {verb}: its virtual tokens shift the positions that "
            "are edited; use LoRA, or train the model itself."
        )
    if any(getattr(rule, "from_", None) == "gradient" for rule in hidden):
        # Set by the trainer's config, or by accelerate, whose launcher tells it by the environment. (ZeRO-3 gathers
        # parameters for the backward pass: hooks see whole gradients there.)
        by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if getattr(config, "fsdp", None) or by_launcher:
            raise AnatomyError(
                "project_out with from: gradient cannot act under FSDP, where a rank sees parts of a gradient only; "
                "train with DDP or DeepSpeed, or project out of hidden states."
            )


class HiddenEdits:
    """The edits of a policy on one model, in the order: latents out, steering, directions out (at each layer).

    Args:
        model: the trained model, wrapped by PEFT or not.
        edits: `PolicyPlan.hidden`; edit j goes by the columns j of the strengths in a batch.
        sides: responses of a row of the batch: 2 of pairs, 1 of SFT rows.

    Attributes:
        kept: layer -> what evaluation and the saved model keep too; hooks for it stay on the model.

    Raises:
        AnatomyError: a layer the model lacks, or weights that no trainable parameter on the residual stream answers to.
    """

    def __init__(self, model: nn.Module, edits: Sequence[HiddenEdit], *, sides: int = 2) -> None:
        self._n_edits, self._n_sides = len(edits), sides
        self._layers: dict[int, _Layer] = {}
        for column, edit in enumerate(edits):
            if isinstance(edit, LowRankSteering):
                for layer in edit.scorer.layers:
                    self._layers.setdefault(layer, _Layer(layer)).edits[column] = edit
            elif not isinstance(edit, GradientProjection):
                self._layers.setdefault(edit.layer, _Layer(edit.layer)).edits[column] = edit
        self._projected = projected_parameters(model, [edit for edit in edits if isinstance(edit, GradientProjection)])
        self._in_step = self._paused = False
        self._strengths: Tensor | None = None  # (2 * batch, n_edits); None: no batch of ours is being trained on
        self._starts: Tensor | None = None
        self._responses: tuple[Tensor, Tensor] | None = None  # (2 * batch,) where they begin and end in their rows
        self.kept: dict[int, Removal] = {}
        for layer, part in self._layers.items():
            module = layer_module(model, layer)
            kept = part.kept
            if kept:
                self.kept[layer] = part.removal(kept)
                module.register_forward_hook(self._hook(part))

    def _hook(self, part: "_Layer") -> Any:
        def edit(h: Tensor) -> Tensor:
            if self._paused:
                return h
            if self._strengths is None:
                removal = part.removal(part.kept)
                return removal.project(removal.ablate(h))
            if len(h) != len(self._strengths):
                raise AnatomyError(
                    f"A forward of {len(h)} rows ran inside a training step on {len(self._strengths)}: edits of hidden "
                    "states would fall on the wrong rows."
                )
            return part(h, self._strengths, self._starts, self._responses)

        return output_hook(edit)

    @contextmanager
    def step(self, model: nn.Module) -> Iterator[None]:
        """The scope of one training step: edits act from `see` on, until the backward pass has ended."""
        handles = []
        try:
            for layer, part in self._layers.items():
                if layer not in self.kept:
                    handles.append(layer_module(model, layer).register_forward_hook(self._hook(part)))
            handles += [parameter.register_hook(edit) for parameter, edit in self._projected]
            self._in_step = True
            yield
        finally:
            self._strengths = self._starts = self._responses = None
            self._in_step = False
            for handle in handles:
                handle.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For forwards of the reference, whose modules may be the policy's own."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def see(self, inputs: Mapping[str, Any]) -> None:
        """Take strengths and turns from a batch: the forward that follows is the policy's on its rows.

        Args:
            inputs: a batch of `CarryColumns`; outside a training step nothing is taken.
        """
        if not self._in_step:
            return
        sides = inputs[STEERING].view(-1, self._n_sides, self._n_edits)  # (batch, sides, n_edits)
        self._strengths = sides.transpose(0, 1).reshape(-1, self._n_edits)
        self._starts = inputs.get(START)
        if RESPONSE in inputs:
            seen = inputs.get(POLICY + "attention_mask", inputs["attention_mask"])
            self._responses = inputs[RESPONSE], seen.sum(dim=1)
        for part in self._layers.values():
            part.group(self._strengths)


_REMOVES = (Ablation, Projection)


@dataclass(eq=False)
class _Layer:
    """All edits at one layer, by their column."""

    layer: int
    edits: dict[int, Steering | LowRankSteering | Ablation | Projection] = field(default_factory=dict)
    _removals: dict[tuple[int, ...], Removal] = field(default_factory=dict)
    _groups: list[tuple[Removal, Tensor | None]] = field(default_factory=list)

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(i for i, edit in self.edits.items() if isinstance(edit, _REMOVES) and edit.keep)

    def removal(self, columns: tuple[int, ...]) -> Removal:
        """What some of the edits take out together: the span of all directions, every latent once."""
        if columns not in self._removals:
            self._removals[columns] = _removal([self.edits[i] for i in columns])
        return self._removals[columns]

    def group(self, strengths: Tensor) -> None:
        """Sort the rows of a batch by the edits that take something out of them."""
        removing = [i for i, edit in self.edits.items() if isinstance(edit, _REMOVES)]
        members: dict[tuple[int, ...], list[int]] = {}
        for row, acts in enumerate((strengths[:, removing] != 0).tolist()):
            members.setdefault(tuple(i for i, on in zip(removing, acts, strict=True) if on), []).append(row)
        if len(members) == 1:
            self._groups = [(self.removal(next(iter(members))), None)]
        else:
            device = strengths.device
            self._groups = [
                (self.removal(columns), torch.tensor(rows, device=device)) for columns, rows in members.items()
            ]

    def __call__(
        self, h: Tensor, strengths: Tensor, starts: Tensor | None, responses: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        h = self._on_groups(h, Removal.ablate)
        added = self._low_rank(h, strengths, responses)
        steering = {i: edit for i, edit in self.edits.items() if isinstance(edit, Steering)}
        if steering:
            work = torch.promote_types(h.dtype, torch.float32)
            vectors = torch.stack([edit.vector for edit in steering.values()]).to(h.device, work)
            with torch.autocast(h.device.type, enabled=False):
                moved = strengths[:, list(steering)].to(h.device, work) @ vectors  # (rows, d_model)
            moved = moved.to(h.dtype)[:, None]
            if starts is not None:
                positions = torch.arange(h.shape[1], device=h.device)
                moved = moved * (positions >= starts.to(h.device)[:, None])[:, :, None]
            h = h + moved
        h = h if added is None else h + added
        return self._on_groups(h, Removal.project)

    def _low_rank(self, h: Tensor, strengths: Tensor, responses: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """What the edits of the ends of responses add to h; None where there are none at this layer."""
        edits = {i: edit for i, edit in self.edits.items() if isinstance(edit, LowRankSteering)}
        if not edits:
            return None
        assert responses is not None  # `plan_columns` carries prompt lengths wherever such an edit is
        starts, stops = (offsets.to(h.device) for offsets in responses)
        total = torch.zeros((), device=h.device)
        for i, edit in edits.items():
            moved = edit.scorer.shift(self.layer, h)
            alpha = strengths[:, i, None].to(h.device, moved.dtype) * ends_of(
                starts, stops, h.shape[1], edit.scorer.ends
            )
            total = total + alpha[..., None] * moved
        return total.to(h.dtype)

    def _on_groups(self, h: Tensor, edit: Callable[[Removal, Tensor], Tensor]) -> Tensor:
        edited = h
        for removal, rows in self._groups:
            if rows is None:
                return edit(removal, h)
            if removal.rows is not None or removal.basis is not None:
                where = rows.to(h.device)
                edited = edited.index_copy(0, where, edit(removal, h[where]))
        return edited


def _removal(edits: Sequence[Any]) -> Removal:
    strengths: dict[int, float] = {}
    removal = Removal()
    for edit in edits:
        if isinstance(edit, Ablation):
            for feature in edit.features:
                strengths[feature] = max(strengths.get(feature, 0.0), edit.strength)
            sae = edit.sae
    if strengths:
        removal.features = tuple(strengths)
        rows = sae.rows(removal.features)
        share = torch.tensor(list(strengths.values()), device=rows.decoder.device)
        removal.rows = rows._replace(decoder=rows.decoder * share[:, None])
        removal.sae = sae if sae.architecture == "topk" else None
    directions = [edit.directions for edit in edits if isinstance(edit, Projection)]
    if directions:
        removal.basis = orthonormal(torch.cat(directions)).float()
    return removal


def projected_parameters(
    model: nn.Module, edits: Sequence[GradientProjection]
) -> list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
    """Trainable parameters that the edits name, and what is done to the gradient of each.

    A gradient is projected on the dimension with which its weight meets the residual stream: where it writes (o_proj,
    down_proj, embeddings, LoRA B of these) or else where it reads (the others, LoRA A of these); see
    `residual_dimension`. Projection is linear, so it is exact under accumulation and over ranks.

    Raises:
        AnatomyError: `weights` finds no trainable parameter on the residual stream.
    """
    chosen: dict[str, list[GradientProjection]] = {}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    for edit in edits:
        named = [name for name in parameters if re.search(edit.weights, name)]
        meeting = [name for name in named if residual_dimension(name) is not None]
        if not meeting:
            raise AnatomyError(
                f"weights {edit.weights!r} finds {len(named)} of the {len(parameters)} trainable parameters, and none "
                f"of them reads or writes the residual stream; they are called as {next(iter(parameters), 'none')!r}."
            )
        for name in meeting:
            chosen.setdefault(name, []).append(edit)
    found = []
    bases: dict[tuple[int, ...], Tensor] = {}
    for name, wanted in chosen.items():
        key = tuple(map(id, wanted))
        if key not in bases:
            bases[key] = orthonormal(torch.cat([edit.directions for edit in wanted])).float()
        found.append((parameters[name], _projector(bases[key], residual_dimension(name))))
    return found


def _projector(basis: Tensor, dimension: int | None) -> Callable[[Tensor], Tensor]:
    def edit(gradient: Tensor) -> Tensor:
        on = basis.to(gradient.device)
        if dimension == 0 and gradient.dim() > 1:
            return project_out(gradient.T, on).T
        return project_out(gradient, on)

    return edit
