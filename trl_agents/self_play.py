# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Self-play: the policy's own earlier selves as opponents (fictitious self-play with a pool of snapshots, as in
https://huggingface.co/papers/1710.03748).
"""

from __future__ import annotations

import copy
import functools
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoints import told_if_refused
from .fsdp import sharded_modules
from .model_opponent import ModelOpponent
from .value_head import VALUE_HEAD_NAME


if TYPE_CHECKING:
    from .trainers.agent_grpo_trainer import AgentGRPOTrainer


class OpponentPool(TrainerCallback):
    """
    The policy's own earlier selves as opponents. Self-play against the present policy alone may go round in circles,
    so each rollout is played against a snapshot from the pool.

    A snapshot holds the parameters that are trained (with LoRA, the adapter), on the CPU. One is taken when training
    begins and then every `every` optimizer steps; when there are more than `size`, the one goes whose neighbours in
    time are closest to each other, so that the pool spans the training and always holds the first and the newest.
    Before each optimizer step every process draws one of them for itself; rollouts and evaluations until the next meet
    it. The drawn one plays as a second model beside the policy, which shares the policy's frozen parameters.

    Snapshots are also files, `<output_dir>/opponents/step_<n>.safetensors`, kept as long as the checkpoints that need
    them: a run resumed from one meets the same pool. Copy the folder with a checkpoint that is moved.

    Metrics: `agents/opponent_age_mean`, the optimizer steps since the snapshot that games were played against, and
    `agents/opponent_invalid_rate`, the share of its replies without a legal action.

    Example:

    ```python
    >>> pool = OpponentPool()
    >>> env = functools.partial(make_env, "trl_agents/TicTacToe-v0", opponent=pool, seat="random")
    >>> args = AgentGRPOConfig("self-play", context="window", window=0)  # positions alone, as the opponent reads them
    >>> trainer = AgentGRPOTrainer("Qwen/Qwen3-0.6B", env=env, args=args)
    >>> pool.bind(trainer)
    >>> trainer.train()
    ```

    Args:
        size (`int`, *optional*, defaults to `8`):
            Most snapshots that are kept.
        every (`int`, *optional*, defaults to `10`):
            Optimizer steps between two snapshots.
        latest (`float`, *optional*, defaults to `0.5`):
            Probability of drawing the newest; otherwise each is as likely, the newest among them.
        seed (`int`, *optional*, defaults to `0`):
            Seeds the draws.
        random_moves (`float`, *optional*, defaults to `0.0`):
            Share of the opponent's moves that are random legal ones instead. A policy that has settled plays one
            game over and over, and whoever loses it learns nothing from it any more; noise makes games differ.

    Attributes:
        snapshots (`dict[int, dict[str, torch.Tensor]]`):
            The pool: optimizer step -> trained parameters by name.
        current (`int`):
            Step of the snapshot that plays.
        opponent ([`ModelOpponent`]):
            It plays with the weights of `current`; None before [`bind`].
    """

    def __init__(self, size: int = 8, every: int = 10, latest: float = 0.5, seed: int = 0, random_moves: float = 0.0):
        for name, value in (("size", size), ("every", every)):
            if value < 1:
                raise ValueError(f"{name}={value!r}: give a number of at least 1.")
        for name, value in (("latest", latest), ("random_moves", random_moves)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}={value!r} is a probability: give a number from 0 to 1.")
        self.size, self.every, self.latest, self.seed, self.random_moves = size, every, latest, seed, random_moves
        self.snapshots: dict[int, dict[str, torch.Tensor]] = {}
        self.current = 0
        self.opponent: ModelOpponent | None = None
        self.trainer: AgentGRPOTrainer | None = None

    def __call__(self, board: str, legal_actions: list[str], rng: np.random.Generator) -> str:
        if self.opponent is not None:
            if self.random_moves and rng.random() < self.random_moves:
                return legal_actions[rng.integers(len(legal_actions))]
            return self.opponent(board, legal_actions, rng)
        if set(board) == {"0"}:
            # A trainer starts one episode in its constructor, to look at the environment before it loads the model;
            # where the opponent moves first it asks for this one move. No game gets further than that.
            return legal_actions[rng.integers(len(legal_actions))]
        raise RuntimeError(
            "This OpponentPool has no past self to play with yet. Call `pool.bind(trainer)` when the trainer is made, "
            "before it plays."
        )

    def __deepcopy__(self, memo: dict) -> OpponentPool:
        return self  # as ModelOpponent's: all environments play against this one

    @property
    def invalid_rate(self) -> float:
        """Share of the opponent's replies without a legal action since it was drawn; NaN where there is none."""
        return float("nan") if self.opponent is None else self.opponent.invalid_rate

    def bind(self, trainer: AgentGRPOTrainer) -> None:
        """
        Take the past selves from `trainer`, and play as its policy does: same tokenizer, parser, sampling and context.
        Every process of a distributed run must call this, before `trainer.train()`.
        """
        if self.trainer is not None:
            raise ValueError("This OpponentPool is bound to a trainer already: make one pool for each trainer.")
        if not getattr(trainer, "plays", False):
            raise ValueError(f"This {type(trainer).__name__} has no `env` to play in: pass the game to the trainer.")
        if sharded_modules(trainer.model):
            raise ValueError(
                "OpponentPool cannot copy a model whose parameters FSDP2 shards already: call `pool.bind(trainer)` "
                "before `trainer.train()`."
            )
        if trainer.args.cast_lm_head_to_fp32:
            raise ValueError(
                "cast_lm_head_to_fp32=True ties a forward pass to the policy's own weights, which a past self must "
                "not use. Use False with OpponentPool."
            )
        if (trainer.args.context, trainer.args.window) != ("window", 0) and trainer.accelerator.is_main_process:
            warnings.warn(
                f"With context={trainer.args.context!r} and window={trainer.args.window} the policy reads a position "
                "with what came before it, and a past self reads the position alone: a model that knows little beside "
                "the game will answer it poorly. With context='window' and window=0 both read the same.",
                stacklevel=2,
            )
        self.trainer = trainer
        trainer.add_callback(self)
        self._open()
        self._draw(0)

    # -- what the trainer calls --------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        self.snapshots = self._find(state.global_step) if state.global_step > 0 else {}
        # The policy may have been moved, cast, or loaded from a checkpoint since the pool was bound
        self._open(state.global_step)
        self._draw(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self._draw(state.global_step)  # the only place between `bind` and the end: no game is on

    def on_step_end(self, args, state, control, **kwargs):
        played, invalid = self.opponent.n_replies, self.opponent.n_invalid
        # `_draw` has set the counts to 0 at this step's begin, when there was one update less
        age = state.global_step - 1 - self.current
        accelerator = self.trainer.accelerator
        sums = [float(played), float(invalid), float(played > 0), float(age * (played > 0))]
        sums = accelerator.reduce(torch.tensor(sums, device=accelerator.device), reduction="sum")
        replies, invalid, processes, ages = sums.tolist()
        if replies:  # a step may train on what an earlier one has played
            self.trainer.record_metrics(
                {"agents/opponent_age_mean": ages / processes, "agents/opponent_invalid_rate": invalid / replies}
            )
        if state.global_step % self.every == 0:
            with self.trainer.weights_for_rollout() as model:  # a collective: all processes are here
                self._keep(state.global_step, _trained_parameters(model))

    def on_save(self, args, state, control, **kwargs):
        self._remove_files()

    # -- the pool ----------------------------------------------------------------------------------------------------

    def _open(self, step: int | None = None) -> None:
        """Make the model that plays, and the first snapshot where there is none; `step` says what to file it under."""
        trainer = self.trainer
        args = trainer.args
        empty = any(gather_object([not self.snapshots]))
        with trainer.weights_for_rollout() as model:
            if sharded_modules(model):  # they cannot be copied, but there is a copy from before they were sharded
                policy = _brought_up_to_date(self.opponent.model, model, trainer.accelerator.device)
            else:
                policy = copy_policy(model)
            self.opponent = ModelOpponent(
                policy,
                trainer.text_tokenizer,
                trainer.env_factory,
                action_parser=trainer.action_parser,
                temperature=trainer.temperature,
                top_p=trainer.top_p,
                top_k=trainer.top_k,
                min_p=trainer.min_p,
                max_new_tokens=args.max_completion_length,
                context=args.context,
                chat_template_kwargs=args.chat_template_kwargs,
                n_slots=args.rollout_batch_size or args.per_device_train_batch_size * args.steps_per_generation,
                autocast=trainer.accelerator.autocast,
            )
            if empty:
                self._keep(step or 0, _trained_parameters(model), write=step is not None)

    def _draw(self, step: int) -> None:
        """Let another past self play. The draw depends on the step and the process alone, so resuming repeats it."""
        rng = np.random.default_rng([self.seed, step, self.trainer.accelerator.process_index])
        steps = sorted(self.snapshots)
        newest = rng.random() < self.latest
        self.current = steps[-1] if newest else steps[rng.integers(len(steps))]
        weights = self.snapshots[self.current]
        with self.opponent.changing_weights(), torch.no_grad():
            for name, parameter in self.opponent.model.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])

    def _keep(self, step: int, weights: dict[str, torch.Tensor], write: bool = True) -> None:
        self.snapshots[step] = weights
        self.snapshots = {kept: self.snapshots[kept] for kept in thin_out(self.snapshots, self.size)}
        if write:
            self._write(step, weights)
            if self.trainer.args.save_strategy == "no":  # `on_save` will not be called
                self._remove_files()

    def _write(self, step: int, weights: dict[str, torch.Tensor]) -> None:
        if not self.trainer.args.should_save:
            return
        path = self._file(step)
        unfinished = path.with_suffix(".tmp")
        with told_if_refused(f"The past self of step {step}", path.parent, self.trainer.args.output_dir):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(weights, str(unfinished), metadata={"format": "pt"})
            os.replace(unfinished, path)  # a run that is killed leaves no half of a file behind

    def _find(self, step: int) -> dict[int, dict[str, torch.Tensor]]:
        """The pool as it was after `step` optimizer steps, from its files."""
        names = {n for n, p in self.opponent.model.named_parameters() if n in next(iter(self.snapshots.values()))}
        expected = self._plan(step)
        files = self._files_to_resume_from()
        steps = [taken for taken in expected if taken in files]
        if steps != expected:  # another `size` or `every`, or files that are gone
            steps = thin_out([taken for taken in files if taken <= step], self.size)
            warnings.warn(
                f"The pool after step {step} held the snapshots of the steps {expected}, but {self._file(0).parent} "
                f"does not have them all. The run goes on with {steps or 'the present policy alone'}.",
                stacklevel=2,
            )
        found = {taken: load_file(str(files[taken])) for taken in steps}
        for taken, weights in found.items():
            if weights.keys() != names:
                raise ValueError(
                    f"{files[taken]} holds other parameters than this policy trains, such as "
                    f"{min(weights.keys() ^ names)}. Resume with the settings of the run that wrote it, or remove "
                    f"{files[taken].parent}."
                )
        for taken in steps:
            if files[taken] != self._file(taken):  # this run's checkpoints will need it too
                self._write(taken, found[taken])
        return found

    def _files_to_resume_from(self) -> dict[int, Path]:
        """Snapshots by their step: those beside the checkpoint that is resumed from, or else this run's."""
        folders = [self._file(0).parent]
        if self.trainer.resumed_from is not None:
            folders.append(Path(self.trainer.resumed_from).parent / folders[0].name)
        paths = [path for folder in folders for path in folder.glob("step_*.safetensors")]
        return {int(path.stem.removeprefix("step_")): path for path in paths}

    def _file(self, step: int) -> Path:
        return Path(self.trainer.args.output_dir) / "opponents" / f"step_{step}.safetensors"

    def _plan(self, step: int) -> list[int]:
        """Which snapshots the pool holds after `step` optimizer steps."""
        kept: list[int] = []
        for taken in range(0, step + 1, self.every):
            kept = thin_out([*kept, taken], self.size)
        return kept

    def _remove_files(self) -> None:
        if not self.trainer.args.should_save:
            return
        needed = set(self.snapshots)
        for folder in Path(self.trainer.args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if folder.name.rpartition("-")[2].isdecimal():
                needed.update(self._plan(int(folder.name.rpartition("-")[2])))
        kept = {self._file(step) for step in needed}
        for path in self._file(0).parent.glob("step_*.safetensors"):
            if path not in kept:
                path.unlink()


def thin_out(steps, size: int) -> list[int]:
    """
    At most `size` of `steps`, in order and spread: as long as there are too many, the one goes whose neighbours are
    closest to each other (the earliest of several). The first and the last stay; of one, the last.
    """
    kept = sorted(steps)
    while len(kept) > max(size, 2):
        gaps = [after - before for before, after in zip(kept, kept[2:], strict=False)]
        del kept[1 + gaps.index(min(gaps))]
    return kept[-size:]


def copy_policy(model: PreTrainedModel) -> PreTrainedModel:
    """
    A copy of `model` for another thread to decode with. Trained parameters are copied, frozen ones are shared, a value
    head and its hooks are left out. No gradient is ever needed of it.
    """
    memo: dict[int, Any] = {id(frozen): frozen for frozen in model.parameters() if not frozen.requires_grad}
    stand_in = nn.Identity()
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == VALUE_HEAD_NAME:
            memo[id(module)] = stand_in
    copied = copy.deepcopy(model, memo)
    for module in list(copied.modules()):
        if getattr(module, VALUE_HEAD_NAME, None) is stand_in:
            delattr(module, VALUE_HEAD_NAME)
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__self__", None) is stand_in:
                del module._forward_hooks[key]
        # TRL and accelerate put functions in the place of `forward` that hold on to the model they were made for: the
        # copy would go on to compute with the policy's weights, without a sign. Those of `device_map` are partials,
        # which are copied as they should.
        if not isinstance(module.__dict__.get("forward"), functools.partial):
            module.__dict__.pop("forward", None)
        module._parameters = dict(module._parameters)  # DeepSpeed puts a container in its place that gathers shards
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    return copied


def _brought_up_to_date(copied: PreTrainedModel, model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """A copy with the weights that `model` has by now, on its device."""
    weights = {_name_of(name): parameter for name, parameter in model.named_parameters()}
    copied.to(device)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            parameter.copy_(weights[name])
    return copied


def _trained_parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Copies on the CPU, by name, without a value head."""
    return {
        _name_of(name): parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and VALUE_HEAD_NAME not in name.split(".")
    }


def _name_of(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")  # FSDP's own activation checkpointing
