# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Log-probabilities of given continuations after given prompts, with every distinct prefix computed once.

Prompts that begin alike, and the continuations of each, form a tree of tokens. Its longest prompt is read first, like
any text, and stays in the key-value cache; whatever branches off is read in blocks behind it, where each token attends
to its own ancestors only. So as many tokens are read as there are distinct prefixes, the least possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..rollout.attention import attending
from ..rollout.cache import cache_argument
from ..rollout.generation import common_prefix_length
from ..rollout.slots import SlotModel


@dataclass(frozen=True, slots=True)
class Cost:
    """What scoring took, and what it would have taken to read every (prompt, continuation) pair by itself."""

    forward_passes: int = 0
    tokens: int = 0
    naive_forward_passes: int = 0
    naive_tokens: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


def action_probabilities(
    logprobs: np.ndarray, continuations: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """
    A distribution over actions from the log-probabilities of the replies that state them.

    Where one reply is the beginning of another ("ACTION=1" of "ACTION=10"), the probability of the longer one is taken
    off the shorter one's, so that each counts what is said and not what is begun.

    Args:
        logprobs (`np.ndarray`):
            `(n_prompts, n_actions)`.
        continuations (`Sequence[Sequence[int]]`):
            The token ids of each reply.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the distributions `(n_prompts, n_actions)`, which sum to 1, and what the
        probabilities summed to before, `(n_prompts,)`.
    """
    logprobs = np.asarray(logprobs, dtype=float)
    top = logprobs.max(axis=1, keepdims=True)
    begun = np.exp(logprobs - top)  # relative to the largest: long replies may be too improbable for a float
    said = begun.copy()
    for shorter, start in enumerate(continuations):
        longer = [n for n, ids in enumerate(continuations) if len(ids) > len(start) and _begins(ids, start)]
        # Of "1", "10" and "100", the last is a part of the second already
        inner = [n for n in longer if any(m != n and _begins(continuations[n], continuations[m]) for m in longer)]
        nearest = [n for n in longer if n not in inner]
        said[:, shorter] -= begun[:, nearest].sum(axis=1)
    said = said.clip(min=0.0)
    total = said.sum(axis=1, keepdims=True)
    return said / total, (total * np.exp(top))[:, 0]


def _begins(ids: Sequence[int], start: Sequence[int]) -> bool:
    return list(ids[: len(start)]) == list(start)


class TreeScorer:
    """
    Scores continuations with a causal language model.

    A model whose logits cannot be computed so (recurrent layers, positions of its own; [`SlotModel`] finds out by
    trying) is read plainly: each prompt with all continuations in one batch. The results are the same.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model.
        block (`int`, *optional*, defaults to `1024`):
            About how many tokens one forward pass reads.
    """

    def __init__(self, model: PreTrainedModel, block: int = 1024):
        self.model, self.block = model, block
        self.reader = _TreeReader(model) if self.unsupported(model) is None else None
        self.cost = Cost()

    @staticmethod
    def unsupported(model: PreTrainedModel) -> str | None:
        """Why this model is read plainly, or None."""
        config = model.config.get_text_config()
        scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        kinds = {scaling.get("rope_type"), *(v.get("rope_type") for v in scaling.values() if isinstance(v, dict))}
        if kinds & {"dynamic", "longrope"}:
            return "its rotary embeddings depend on the longest text of a forward pass"
        return SlotModel.unsupported(model)

    @torch.no_grad()
    def score(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> np.ndarray:
        """
        Log-probabilities, `(n_prompts, n_continuations)`. What they took is added to `self.cost`.

        Args:
            prompts (`Sequence[Sequence[int]]`):
                Token ids.
            continuations (`Sequence[Sequence[int]]`):
                Token ids, each scored after each prompt.
        """
        if not all(prompts) or not all(continuations):
            raise ValueError("A prompt or a continuation is empty: there is nothing to score.")
        lengths = [len(prompt) + len(ids) for prompt in prompts for ids in continuations]
        training = self.model.training
        self.model.eval()
        try:
            if self.reader is None:
                scores, passes, tokens = score_plainly(self.model, prompts, continuations)
            else:
                scores, passes, tokens = self.reader.score(prompts, continuations, self.block)
        finally:
            self.model.train(training)
        self.cost += Cost(passes, tokens, len(lengths), sum(lengths))
        return scores


@torch.no_grad()
def score_plainly(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> tuple[np.ndarray, int, int]:
    """The same from scratch: a forward pass a prompt, a row a continuation. Returns scores, passes and tokens."""
    longest = max(map(len, continuations))
    scores, tokens = np.zeros((len(prompts), len(continuations))), 0
    for number, prompt in enumerate(prompts):
        # The last token is only looked up. Padding stands on the right, where no token before it looks.
        rows = [[*prompt, *ids[:-1]] for ids in continuations]
        width = len(prompt) + longest - 1
        padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
        logits = model(input_ids=padded, attention_mask=mask, use_cache=False, logits_to_keep=longest).logits
        tokens += sum(map(len, rows))
        for row, ids in enumerate(continuations):
            logprobs = logits[row, -longest:].float().log_softmax(-1)  # (longest, V)
            scores[number, row] = sum(logprobs[place, token].item() for place, token in enumerate(ids))
    return scores, len(prompts), tokens


class _Tree:
    """All prefixes of some texts, parents before children. A node's column is its depth; -1 is the empty text."""

    def __init__(self):
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.children: dict[tuple[int, int], int] = {}

    def add(self, ids: Sequence[int], node: int = -1) -> list[int]:
        """The nodes of `ids` behind `node`, made where they are missing."""
        path = []
        for token in ids:
            child = self.children.get((node, token))
            if child is None:
                child = self.children[node, token] = len(self.tokens)
                self.tokens.append(int(token))
                self.parents.append(node)
                self.depths.append(self.depths[node] + 1 if node >= 0 else 0)
            path.append(child)
            node = child
        return path


class _TreeReader(SlotModel):
    """A model that reads a tree of tokens: one slot of the cache, whose first columns are the tree's trunk."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model, n_slots=1)
        self.trunk: list[int] = []  # the tokens of the cached columns

    def score(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], block: int
    ) -> tuple[np.ndarray, int, int]:
        tree = _Tree()
        ends = [tree.add(prompt)[-1] for prompt in prompts]
        paths = [[tree.add(ids, end) for ids in continuations] for end in ends]
        trunk = tree.add(max(prompts, key=len))  # its nodes: they are there already
        scored = sorted({node for row in paths for path in row for node in path})
        asked: dict[int, list[int]] = {}  # node -> the children whose probability after it is wanted
        for node in scored:
            asked.setdefault(tree.parents[node], []).append(node)

        logprobs = np.zeros(len(tree.tokens))
        passes = tokens = 0
        for nodes, start in self._blocks(tree, trunk, asked, block):
            self._read(tree, trunk, nodes, start, asked, logprobs)
            passes, tokens = passes + 1, tokens + len(nodes)
        self.trunk = [tree.tokens[node] for node in trunk]
        return np.array([[logprobs[path].sum() for path in row] for row in paths]), passes, tokens

    def _blocks(self, tree: _Tree, trunk: list[int], asked: dict[int, list[int]], block: int) -> Any:
        """What to read, pass by pass: (nodes, column of the first). The trunk first, then what branches off it."""
        known = common_prefix_length(self.trunk, [tree.tokens[node] for node in trunk])
        self.trunk = []  # should this be interrupted, the columns hold a mixture
        # A node whose logits are wanted is read again
        known = min([known, *(tree.depths[node] for node in trunk if node in asked)])
        for start in range(known, len(trunk), block):
            yield trunk[start : start + block], start
        in_trunk, branch_of = set(trunk), {}
        branches: dict[int, list[int]] = {}
        inner = set(tree.parents)  # a leaf's token is looked up, never read
        for node, parent in enumerate(tree.parents):
            if node not in in_trunk:
                branch_of[node] = branch_of.get(parent, node)
                if node in inner:
                    branches.setdefault(branch_of[node], []).append(node)
        waiting: list[int] = []
        for nodes in branches.values():
            if waiting and len(waiting) + len(nodes) > block:
                yield waiting, len(trunk)
                waiting = []
            waiting = waiting + nodes
        if waiting:
            yield waiting, len(trunk)

    def _read(
        self,
        tree: _Tree,
        trunk: list[int],
        nodes: list[int],
        start: int,
        asked: dict[int, list[int]],
        logprobs: np.ndarray,
    ) -> None:
        """One forward pass over `nodes`, written from column `start` on; fills in the probabilities of children."""
        place = {node: number for number, node in enumerate(nodes)}
        depths = np.array([tree.depths[node] for node in nodes])
        within = np.eye(len(nodes), dtype=bool)
        behind = np.zeros(len(nodes), dtype=int)  # how many columns of the trunk a node looks at
        for number, node in enumerate(nodes):
            parent = tree.parents[node]
            if parent in place:
                within[number] |= within[place[parent]]
                behind[number] = behind[place[parent]]
            else:
                behind[number] = tree.depths[parent] + 1 if parent >= 0 else 0
        allowed = np.concatenate([np.arange(start) < behind[:, None], within], axis=1)  # (n, start + n)
        keep = [number for number, node in enumerate(nodes) if node in asked] or [len(nodes) - 1]
        logits = self._forward(
            [tree.tokens[node] for node in nodes], depths, start, allowed, torch.tensor(keep, device=self.device)
        )
        for number, row in zip(keep, logits.float().log_softmax(-1), strict=True):  # (V,)
            children = asked.get(nodes[number], [])
            logprobs[children] = row[[tree.tokens[child] for child in children]].double().cpu().numpy()

    def _forward(
        self, tokens: list[int], depths: np.ndarray, start: int, allowed: np.ndarray, keep: torch.Tensor
    ) -> torch.Tensor:
        columns = torch.arange(start, start + len(tokens), device=self.device)[None]
        self.cache.aim(None, columns, start + len(tokens))
        mask = torch.from_numpy(allowed).to(self.device)[None, None]
        if self.window is not None and self.layer_types != {"full_attention"}:
            # A window counts a node's own past, and its columns may lie far apart
            past = depths[:, None] - np.concatenate([np.arange(start), depths])
            recent = mask & torch.from_numpy(past < self.window).to(self.device)
            masks = {"full_attention": mask, "sliding_attention": recent}
            wanted = {name: self._as_attention_mask(masks[name]) for name in masks}
            mask = wanted if self.layer_types else wanted["sliding_attention"]
        else:
            mask = self._as_attention_mask(mask)
        with attending(self.config, self.attention):
            output = self.model(
                input_ids=torch.tensor([tokens], device=self.device),
                position_ids=torch.from_numpy(depths).to(self.device)[None],
                attention_mask=mask,
                **{cache_argument(self.model): self.cache},
                use_cache=True,
                logits_to_keep=keep,
            )
        return output.logits[0] if output.logits.shape[1] == len(keep) else output.logits[0, keep]
