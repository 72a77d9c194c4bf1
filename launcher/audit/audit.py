"""The checks in their order, on all ranks alike: what they found, and what follows from it.

Done at each start of the workers, since a resume may have changed the layout, and the kernels with it. A finding of any
rank is one of all, so that all end together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from launcher.audit.finding import Checked
from launcher.audit.fused import LossOf, check_fused, growth_bytes
from launcher.audit.masks import UNKNOWN_TOKENS, check_masks
from launcher.audit.packs import check_packs
from launcher.audit.sample import MAX_TOKENS, sampled, two_documents
from launcher.audit.small import vocabulary
from launcher.audit.texts import check_padding, check_texts
from launcher.data.loader import MicroBatch
from launcher.errors import AuditError
from launcher.model.attention import supports_packing
from launcher.plan.plan import Plan

log = logging.getLogger(__name__)

DOCUMENTS = 64
"""Sampled for their masks: what goes wrong with masks goes wrong in most rows."""


class Audit:
    """One start's audit: `before_engine`, `through_engine`, `conclude`, in this order. Each does nothing where the
    recipe says `audit: off`, and each is collective."""

    def __init__(self, plan: Plan, device: torch.device, write: Callable[..., None]) -> None:
        """`write`: a line of metrics, `MetricsLog.write`."""
        self.plan, self.device, self._write = plan, device, write
        self.on = plan.lifecycle.audit != "off"
        self.checked: list[Checked] = []
        self.seconds = 0.0
        self._folder = Path(plan.data.folder)
        self._numbers = sampled(self._folder, DOCUMENTS) if self.on else []

    def before_engine(self, model: nn.Module, base: Any, tokenizer: PreTrainedTokenizerFast, loss_of: LossOf) -> None:
        """Masks, or of a sequence classification its texts; and fused kernels against eager, where the run has them.

        Args:
            model: with adapters where the run has them, not fused yet
            base: the transformers model inside it
            tokenizer: the run's
            loss_of: makes the run's loss for a copy of the model
        """
        if not self.on:
            return
        length, formats = self.plan.trajectory.data.max_length, set(self.plan.data.formats.values())
        rows = vocabulary(base)
        if self._classifies:
            classes = len(self.plan.data.classes)
            self._check(lambda: check_texts(self._folder, self._numbers, tokenizer, rows, classes))
            return
        self._check(lambda: check_masks(self._folder, self._numbers, tokenizer, rows, length, formats))
        if self.plan.layout.kernels == "fused" and not self._unreadable:
            room = growth_bytes(self.plan, model, dist.get_world_size())
            self._check(lambda: check_fused(model, loss_of, self._documents, room, self._largest))

    def through_engine(self, base: Any, logits_of: Callable[[MicroBatch], Tensor]) -> None:
        """Packed documents isolated, or padded ones. `logits_of` goes through the engine, without dropout or
        gradients."""
        if not self.on or self._unreadable:
            return
        if self._classifies:
            rows = min(vocabulary(base), self.plan.data.vocab_size)
            self._check(lambda: check_padding(logits_of, self._folder, self._numbers, rows))
            return
        if not supports_packing(type(base), base.config):
            self.checked.append(Checked("a row of its own for each document"))
            return
        experts = any("experts" in name.split(".") for name, _ in base.named_modules())
        rows = min(vocabulary(base), self.plan.data.vocab_size)
        hint = "let each document have a micro batch of its own: data.packing=false train.micro_batch_size=1"
        if self.plan.layout.attention != "sdpa":
            hint = "set model.attention to sdpa, and please report the model's family with this message"
        self._check(lambda: check_packs(logits_of, self._documents(MAX_TOKENS), rows, experts, hint))

    def conclude(self) -> None:
        """Say what was looked at.

        Raises AuditError on all ranks where something was found and the recipe says `strict`.
        """
        if not self.on:
            return
        found = [finding for checked in self.checked for finding in checked.findings]
        if found and self.plan.lifecycle.audit == "strict":
            hints = list(dict.fromkeys(finding.hint for finding in found))
            raise AuditError(
                "the audit before the first step: " + "\n".join(str(finding) for finding in found),
                hint="; ".join([*hints, "audit=warn trains all the same"]),
            )
        for finding in found:
            log.warning("audit: %s (hint: %s)", finding, finding.hint)
            self._write("audit_finding", what=finding.what, detail=finding.detail, hint=finding.hint)
        said = [checked.says for checked in self.checked if not checked.findings]
        log.info("audit: %s in %.1f s", ", ".join(said) or "nothing is sound", self.seconds)
        self._write("audit", seconds=round(self.seconds, 3), checked=said, findings=len(found))

    def _check(self, check: Callable[[], Checked]) -> None:
        """Run one check; what it found on any rank counts on all."""
        began = time.monotonic()
        mine = check()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        findings = dict.fromkeys(finding for checked in everyone for finding in checked.findings)
        first: Checked = everyone[0]
        if first.skipped:
            log.warning("audit: %s", first.says)
        self.checked.append(Checked(first.says, tuple(findings), first.skipped))
        self.seconds += time.monotonic() - began

    def _documents(self, max_tokens: int) -> MicroBatch:
        """Two documents, which a micro batch of the run could hold."""
        micro = self.plan.trajectory.data.max_length * self.plan.layout.micro_batch_size
        return two_documents(self._folder, self._numbers, max(8, min(max_tokens, micro)))

    def _largest(self, mine: int) -> int:
        """Of the ranks' numbers."""
        found = torch.tensor(mine, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found.item())

    @property
    def _classifies(self) -> bool:
        """Whether documents have no masks to look at, and rows of their own: the task is a sequence classification."""
        return bool(self.plan.data.classes)

    @property
    def _unreadable(self) -> bool:
        """Whether the tokens cannot be put through the model."""
        return any(finding.what == UNKNOWN_TOKENS for checked in self.checked for finding in checked.findings)
