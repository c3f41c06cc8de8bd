# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A causal language model that reads and writes a cache of slots: rows of any length, each a few tokens further."""

from __future__ import annotations

import random
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .attention import CALL_BYTES, GROUPED, PACKED, Segment, attending, best_attention, spans
from .cache import SlotCache, cache_argument


class SlotModel:
    """
    A causal language model whose batch rows are slots of a [`SlotCache`].

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model that [`SlotModel.unsupported`] has no objection to.
        n_slots (`int`):
            Number of slots.
        packs (`bool`, *optional*):
            Whether rows are packed rather than padded, where the model's attention can be exchanged. By default if
            [`SlotModel.unsupported`] found that it gives the same logits.
    """

    # So many tokens of padding in a block cost about as much as one more pass through the model
    PADDING = 64

    def __init__(self, model: PreTrainedModel, n_slots: int, packs: bool | None = None):
        self.model = model
        self.config = model.config.get_text_config()
        self.device = model.device
        self.cache = SlotCache(n_slots, self.config.num_hidden_layers)
        self.with_cache = {cache_argument(model): self.cache, "use_cache": True}
        self.ends = [0] * n_slots  # the first column of each slot in which nothing was written that may still count
        self.attention = best_attention(model)
        self.window = getattr(self.config, "sliding_window", None)
        self.stretches_beyond = _stretches_beyond(self.config)
        self.layer_types = set(getattr(self.config, "layer_types", None) or [])
        if not self.layer_types and not _makes_sliding_masks(model):
            self.window = None  # an entry of the configuration that the model's code does not read
        if packs is None:
            _, _, packs = _VERIFIED.get(model, (None, None, False))
        self.packs = packs and self._can_pack

    @property
    def _can_pack(self) -> bool:
        return self.attention == GROUPED and (self.window is None or self.layer_types == {"full_attention"})

    @staticmethod
    def unsupported(model: PreTrainedModel) -> str | None:
        """Why this model cannot decode in slots, or None. The answer costs a few short forward passes, once."""
        config = model.config.get_text_config()
        attention = config._attn_implementation
        if attention not in ("sdpa", "eager"):
            return f"its attention is {attention!r}, which takes no per-row mask"
        other = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        if "local" in (getattr(config, "attention_layers", None) or []):
            other.add("local attention of its own")
        if other or getattr(model, "_is_stateful", False):
            return f"it has layers without a plain key-value cache ({', '.join(sorted(other)) or 'stateful'})"
        known = _VERIFIED.get(model)
        if known is None or known[0] != attention:
            packs = _disagreement(model, packs=True) is None
            problem = None if packs else _disagreement(model, packs=False)
            known = _VERIFIED[model] = (attention, problem, packs)
        return known[1]

    @torch.no_grad()
    def read(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        """
        Feed each of the slots `rows` (ascending) its `tokens`, from column `starts` on. Returns the logits `(b, V)`
        after each row's last token.

        Rows that differ in the number of tokens are packed, where the model's attention can be exchanged; else they
        are padded to a block, or those that have many read all but the last token apart.
        """
        rows, tokens, starts = list(rows), [list(row) for row in tokens], list(starts)
        for row, new, start in zip(rows, tokens, starts, strict=True):
            self.ends[row] = start + len(new)
        passes = self._alike(tokens, starts)
        if len(passes) == 1:
            return self._read(rows, tokens, starts)
        logits = [self._read(*([part[i] for i in alike] for part in (rows, tokens, starts))) for alike in passes]
        return torch.cat(logits)[torch.tensor([i for alike in passes for i in alike]).argsort()]

    def stretches(self, length: int) -> bool:
        """Whether a row of so many tokens stands at other positions than a shorter one, from its first token on."""
        return self.stretches_beyond is not None and length > self.stretches_beyond

    def _alike(self, tokens: list[list[int]], starts: list[int]) -> list[list[int]]:
        """Which rows share a pass: all, unless the longest of them would stretch the positions of the others."""
        passes: dict[int | None, list[int]] = {}
        for number, (new, start) in enumerate(zip(tokens, starts, strict=True)):
            # With others its last token would be read apart, and the rest perhaps be too short to be stretched
            alone = self.stretches(start + len(new)) and len(new) > 1
            kind = number if alone else -1 - self.stretches(start + len(new))
            passes.setdefault(kind, []).append(number)
        return list(passes.values())

    def _read(self, rows: list[int], tokens: list[list[int]], starts: list[int]) -> torch.Tensor:
        if self.packs:
            return self._read_packed(rows, tokens, starts)
        lengths = [len(row) for row in tokens]
        if len(rows) * max(lengths) - sum(lengths) > self.PADDING:
            long = [number for number, length in enumerate(lengths) if length > 1]
            self._read_block([rows[i] for i in long], [tokens[i][:-1] for i in long], [starts[i] for i in long])
            starts = [start + length - 1 for start, length in zip(starts, lengths, strict=True)]
            tokens = [row[-1:] for row in tokens]
        return self._read_block(rows, tokens, starts)

    def copy(self, source: int, targets: list[int], length: int) -> None:
        """Give the slots `targets` the first `length` columns of the slot `source`."""
        self.cache.copy(source, targets, length)
        for target in targets:
            self.ends[target] = length

    def _read_packed(self, rows: list[int], tokens: list[list[int]], starts: list[int]) -> torch.Tensor:
        column_bytes = self.cache.column_bytes
        call_bytes = CALL_BYTES.get(self.device.type, CALL_BYTES["cuda"])
        ends = [start + len(row) for row, start in zip(tokens, starts, strict=True)]
        place = {row: number for number, row in enumerate(rows)}
        ids, slots, columns, positions, last, segments = [], [], [], [], [0] * len(rows), []
        for span in spans(rows, list(map(len, tokens)), ends, column_bytes, call_bytes):
            begin, allowed = len(ids), []
            for row in range(span.first, span.last):
                number = place.get(row)
                if number is None or len(tokens[number]) != span.n:  # a row between: written behind all that counts
                    new, own, seen = [0], [self.ends[row]], [0]
                else:
                    new, last[number] = tokens[number], len(ids) + span.n - 1
                    own = seen = list(range(starts[number], ends[number]))
                ids += new
                slots += [row] * len(new)
                columns += own
                positions += seen
                allowed.append(seen)
            mask = None
            if span.n > 1 or any(seen[0] != span.columns - 1 for seen in allowed):
                allowed = allowed[:1] if all(seen == allowed[0] for seen in allowed) else allowed
                upto = torch.tensor(allowed, device=self.device)[:, None, :, None]  # (rows or 1, 1, n, 1)
                mask = torch.arange(span.columns, device=self.device) <= upto
            segments.append(Segment(slice(begin, len(ids)), span.first, span.last, span.n, span.columns, mask))
        used = max(columns) + 1
        ids, slots, columns, positions, last = (
            torch.tensor(values, device=self.device) for values in (ids, slots, columns, positions, last)
        )
        self.cache.aim_packed(slots, columns, used)
        with attending(self.config, PACKED, segments):
            output = self.model(
                input_ids=ids[None],
                position_ids=positions[None],
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device),  # the segments have masks
                **self.with_cache,
                logits_to_keep=last,
            )
        return output.logits[0]

    def _read_block(self, rows: list[int], tokens: list[list[int]], starts: list[int]) -> torch.Tensor:
        wanted = None
        block = rows[-1] + 1
        # Riding along costs less than gathering the cache, until few of the rows have something to say
        if len(rows) < block < 2 * len(rows):
            wanted = rows
            place = {row: number for number, row in enumerate(rows)}
            tokens = [tokens[place[row]] if row in place else [0] for row in range(block)]
            starts = [starts[place[row]] if row in place else self.ends[row] for row in range(block)]
            rows = list(range(block))
        lengths = [len(row) for row in tokens]
        width = max(lengths)
        # Padding is on the left, so that the last logits are those of the last token, but it is written behind the
        # row's end, where the row's next tokens overwrite it
        padded = torch.tensor([[*[0] * (width - len(row)), *row] for row in tokens], device=self.device)  # (b, n)
        offsets = torch.tensor(lengths, device=self.device)[:, None] + torch.arange(width, device=self.device)
        columns = torch.tensor(starts, device=self.device)[:, None] + offsets % width  # (b, n)
        # To the model it stands at the last token's position: it may not run past a table of learnt positions, nor
        # change rotary embeddings that depend on the largest position
        ends = torch.tensor([start + length - 1 for start, length in zip(starts, lengths, strict=True)])
        if wanted is not None:
            ends[[row not in place for row in rows]] = 0  # theirs is read by nobody, and must change nobody's
        slots = None if len(rows) == block else torch.tensor(rows, device=self.device)
        self.cache.aim(slots, columns, max(starts) + width)
        with attending(self.config, self.attention):
            output = self.model(
                input_ids=padded,
                position_ids=columns.minimum(ends.to(self.device)[:, None]),
                attention_mask=self._mask(columns),
                **self.with_cache,
                logits_to_keep=1,
            )
        logits = output.logits[:, -1]
        return logits if wanted is None else logits[wanted]

    def _mask(self, positions: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        columns = torch.arange(self.cache.columns, device=self.device)
        causal = (columns <= positions[..., None])[:, None]  # (b, 1, n, columns)
        if self.window is None or self.layer_types == {"full_attention"}:
            return self._as_attention_mask(causal)
        recent = causal & (columns > positions[..., None] - self.window)[:, None]
        if not self.layer_types:
            return self._as_attention_mask(recent)
        masks = {"full_attention": causal, "sliding_attention": recent}
        return {name: self._as_attention_mask(mask) for name, mask in masks.items()}

    def _as_attention_mask(self, allowed: torch.Tensor) -> torch.Tensor:
        if self.config._attn_implementation != "eager":
            return allowed
        dtype = self.model.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=self.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )


def _stretches_beyond(config: PreTrainedConfig) -> int | None:
    """From how many tokens on `config` has other positions for all of them, the first included; None: never."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    limits = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(limits, default=None)


# Answers of `_disagreement`, each with the attention it was found with, and whether tokens may be packed.
_VERIFIED: weakref.WeakKeyDictionary[Any, tuple[str, str | None, bool]] = weakref.WeakKeyDictionary()


def _makes_sliding_masks(model: torch.nn.Module) -> bool:
    """Whether the code of some part of the model makes masks with a sliding window."""
    modules = {type(part).__module__ for part in model.modules()}
    return any(hasattr(sys.modules.get(name), "create_sliding_window_causal_mask") for name in modules)


@torch.no_grad()
def _disagreement(model: PreTrainedModel, packs: bool) -> str | None:
    """
    Why this model's own forward passes say something else than [`SlotModel`], or None.

    Architectures may take positions and masks for themselves (ALiBi, prompt tuning, code from the Hub), and the wrong
    distribution would be sampled without a sign. So a few rows are read in ragged blocks and compared.
    """
    luck = random.Random(0)
    vocab_size = min(model.config.get_text_config().vocab_size, 256)  # ids of images and the like come late
    rows = [[luck.randrange(vocab_size) for _ in range(length)] for length in (6, 8, 12)]
    cuts = [(0, 0, 0), (2, 4, 8), (5, 7, 11), (6, 8, 12)]  # ragged, side by side at different positions, a token each
    training = model.training
    model.eval()
    try:
        slots, errors = SlotModel(model, 4, packs), []
        if packs and not slots.packs:
            return "its attention cannot be exchanged"
        for number, (starts, ends) in enumerate(zip(cuts, cuts[1:], strict=False)):
            tokens = [row[start:end] for row, start, end in zip(rows, starts, ends, strict=True)]
            logits = slots.read([0, 1, 3], tokens, starts)
            for row, end, found in zip(rows, ends, logits, strict=True):
                if number > 0:
                    ids = torch.tensor([row[:end]], device=slots.device)
                    expected = model(input_ids=ids, use_cache=False).logits[0, -1].float()
                    errors.append((found.float() - expected).norm() / (expected - expected.mean()).norm())
        # Rounding is far below, and what is wrong with positions or masks far above
        tolerance = 5e-3 if slots.cache.layers[0].keys.dtype in (torch.float32, torch.float64) else 0.1
        # The median: in half precision a token of a mixture may meet another expert. Most rows are not the longest,
        # which is right by chance where positions are counted from the length of the cache.
        error = torch.stack(errors).median().item()
    except torch.OutOfMemoryError:
        raise
    except Exception as exception:
        return f"it takes no positions, masks and cache of the usual form ({type(exception).__name__}: {exception})"
    finally:
        model.train(training)
    return None if error < tolerance else f"with a cache of slots its logits are off by {error:.0%}"
