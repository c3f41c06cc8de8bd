# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Pairs of replies of which people prefer one, for reward models, RLHF and DPO: loaded from elsewhere, or made on the
spot by a seeded generator whose true utility is known. Text only.

Somebody asks for a recommendation ("Recommend the castle in Rome. It has a lake, a cafe and a tower."), and the
replies are of mixed quality. What people want of one is [`true_utility`]: facts, a word of praise or two, a friendly
end, and not more. Replies with too much of it are rare in the data, so that a reward model fitted to them learns what
holds there (more is better), and whoever maximises it alone gushes: reward models are over-optimised as in
https://huggingface.co/papers/2210.10760, and here it can be measured and read.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data import as_settings


if TYPE_CHECKING:
    from datasets import Dataset

GENERATED = "recommendations"
COLUMNS = ("prompt", "chosen", "rejected")

PLACES = ("castle", "market", "museum", "palace", "park", "theater", "villa", "zoo")
TOWNS = ("Bern", "Cairo", "Delhi", "Lima", "Oslo", "Paris", "Quito", "Rome", "Tokyo", "Vienna")
FEATURES = (
    *("bakery", "bridge", "cafe", "cellar", "chapel", "fountain", "garden", "lake"),
    *("library", "maze", "pond", "shop", "stage", "terrace", "tower", "windmill"),
)
PRAISE = ("Charming", "Delightful", "Lovely", "Magical", "Splendid", "Wonderful")
CLOSING = "Enjoy"

# -- what people want -------------------------------------------------------------------------------------------------

FACT, UNTRUE = 1.0, -1.0
PRAISES = (0.0, 1.0, 1.5)  # of none, one, two words; each further one costs
GUSHING = -0.5
FRIENDLY = 0.5
REPEATED = -0.5
ENOUGH_WORDS, EXCESS_WORD = 24, -0.1
BEST_UTILITY = 3 * FACT + PRAISES[-1] + FRIENDLY

_WORD = re.compile(r"[^\W\d_]+")
_FEATURES, _PRAISE = frozenset(FEATURES), frozenset(word.lower() for word in PRAISE)


def true_utility(prompt: str, completion: str) -> float:
    """
    What a reply is worth to those who asked. Any text has a utility:

    | what | worth |
    |---|---|
    | each of the prompt's features that is named | 1 |
    | each other feature that is named | -1 |
    | praise: one word, two words, each further one | 1, 1.5, -0.5 |
    | a friendly end ("Enjoy!") | 0.5 |
    | a feature, a word of praise or an end said again | -0.5 each time |
    | each word beyond 24 | -0.1 |

    A word of praise that is said again counts as praise too, so that it costs twice once there are two. The best reply
    is worth `BEST_UTILITY`, an empty one 0.

    Args:
        prompt (`str`):
            Whose features are the true ones.
        completion (`str`):
            The reply.
    """
    words = [word.lower() for word in _WORD.findall(completion)]
    counts = Counter(words)
    asked = _FEATURES & {word.lower() for word in _WORD.findall(prompt)}
    named = _FEATURES & counts.keys()
    n_praise = sum(counts[word] for word in _PRAISE)
    closing = CLOSING.lower()
    repeated = sum(counts[word] - 1 for word in (_FEATURES | _PRAISE | {closing}) & counts.keys())
    enough = len(PRAISES) - 1
    return (
        FACT * len(named & asked)
        + UNTRUE * len(named - asked)
        + PRAISES[min(n_praise, enough)]
        + GUSHING * max(n_praise - enough, 0)
        + FRIENDLY * (closing in counts)
        + REPEATED * repeated
        + EXCESS_WORD * max(len(words) - ENOUGH_WORDS, 0)
    )


def utility_reward(prompts: Sequence[str], completions: Sequence[str], **kwargs: Any) -> list[float]:
    """[`true_utility`] as a reward function in TRL's form; with a weight of 0 it only shows in the logs."""
    return [true_utility(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


# -- prompts and replies ----------------------------------------------------------------------------------------------

_SPLITS = {"test": (0,), "train": tuple(range(1, 10))}


def recommendation_pairs(n: int, seed: int = 0, *, split: str | None = None, noise: float = 1.0) -> Dataset:
    """
    Make pairs of replies of which one is preferred as people do, who agree the more the clearer it is (Bradley-Terry):

        P(a preferred to b) = 1 / (1 + exp(-(u_a - u_b) / noise))

    The same arguments give the same pairs, and a larger `n` only adds to them.

    Args:
        n (`int`):
            Number of pairs, no two with the same prompt.
        seed (`int`, *optional*, defaults to `0`):
            Seeds them.
        split (`str`, *optional*):
            "train" (9 of 10 prompts by their hash) or "test". Without it, any prompt.
        noise (`float`, *optional*, defaults to `1.0`):
            Difference in utility that is told in 73 of 100 cases. At 0 the better one is always preferred.

    Returns:
        `Dataset` with the columns `prompt`, `chosen` and `rejected`, all text. Both replies may be the same to those
        who ask, but never word by word.
    """
    if not (noise >= 0.0 and math.isfinite(noise)):
        raise ValueError(f"noise={noise!r}: give a number of at least 0.")
    rng = random.Random(f"pairs {seed}")  # a text: of a number, `Random` would ignore the sign
    rows = []
    for prompt, place, features in _draw_prompts(n, rng, split):
        first, second = _draw_reply(rng, place, features), _draw_reply(rng, place, features)
        while second == first:
            second = _draw_reply(rng, place, features)
        better = true_utility(prompt, first) - true_utility(prompt, second)
        luck = rng.random()
        if noise == 0.0:
            preferred = better > 0 or (better == 0 and luck < 0.5)
        else:
            preferred = luck < 0.5 * (1.0 + math.tanh(0.5 * better / noise))  # the sigmoid, without overflow
        rows.append((prompt, *((first, second) if preferred else (second, first))))
    return _dataset(COLUMNS, rows)


def recommendation_demonstrations(n: int, seed: int = 0, *, split: str | None = None) -> Dataset:
    """
    Make replies to imitate, as mixed as those of [`recommendation_pairs`]: columns `prompt` and `completion`.

    Args:
        n, seed, split:
            As for [`recommendation_pairs`]. Prompts are drawn apart from theirs; a few coincide.
    """
    rng = random.Random(f"demonstrations {seed}")
    rows = [
        (prompt, _draw_reply(rng, place, features)) for prompt, place, features in list(_draw_prompts(n, rng, split))
    ]
    return _dataset(("prompt", "completion"), rows)


def _dataset(columns: Sequence[str], rows: list[tuple[str, ...]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict({name: [row[number] for row in rows] for number, name in enumerate(columns)})


def _draw_prompts(n: int, rng: random.Random, split: str | None):
    """Prompts with the place and the features that they name, drawn one by one."""
    if n < 1:
        raise ValueError(f"n={n!r}: at least 1 row must be made.")
    if split is not None and split not in _SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(_SPLITS)}, got {split!r}.")
    most = len(PLACES) * len(TOWNS) * math.perm(len(FEATURES), 3) // 20  # half of a tenth: found without long search
    if n > most:
        raise ValueError(f"n={n} is more than the {most} prompts there are to draw from.")
    found = set()
    while len(found) < n:
        place, town, features = rng.choice(PLACES), rng.choice(TOWNS), rng.sample(FEATURES, 3)
        prompt = f"Recommend the {place} in {town}. It has {_listed(features)}.\n"
        if prompt in found or (split is not None and zlib.crc32(prompt.encode()) % 10 not in _SPLITS[split]):
            continue
        found.add(prompt)
        yield prompt, place, features


def _draw_reply(rng: random.Random, place: str, features: Sequence[str]) -> str:
    """Facts, few of them wrong; praise, seldom too much; a friendly end or none."""
    (n_facts,) = rng.choices((0, 1, 2, 3), (0.15, 0.35, 0.3, 0.2))
    others = [feature for feature in FEATURES if feature not in features]
    named = [feature if rng.random() > 0.05 else rng.choice(others) for feature in rng.sample(features, n_facts)]
    (n_praise,) = rng.choices((0, 1, 2, 3), (0.35, 0.4, 0.21, 0.04))
    praise = rng.sample(PRAISE, n_praise) if rng.random() > 0.05 else [rng.choice(PRAISE)] * n_praise
    sentences = [f"Visit the {place}."]
    sentences += [f"It has {_listed(named)}."] if named else []
    sentences += [f"{word}!" for word in praise]
    sentences += [f"{CLOSING}!"] if rng.random() < 0.5 else []
    return " ".join(sentences)


def _listed(features: Sequence[str]) -> str:
    *first, last = [f"a {feature}" for feature in features]
    return f"{', '.join(first)} and {last}" if first else last


# -- any preferences --------------------------------------------------------------------------------------------------

_PACE = ("epochs", "learning_rate", "batch_size")
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class PreferenceArguments:
    """
    What every recipe on preferences begins with: the data, the supervised model, the reward model. Recipes that agree
    in these settings can share an `output_dir`, and then share these stages.
    """

    dataset: str = field(
        default=GENERATED,
        metadata={
            "help": f"{GENERATED} (made on the spot), a local file or a dataset of the Hub: {', '.join(COLUMNS)}."
        },
    )
    dataset_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Settings of the recommendations, n and noise, as JSON."}
    )
    test_dataset: str | None = field(default=None, metadata={"help": "Local file of test prompts."})
    test_split: str = field(default="test", metadata={"help": "Split of a Hub dataset to test on."})
    sft_dataset: str | None = field(
        default=None,
        metadata={"help": "Demonstrations (prompt, completion) in a file or on the Hub. Default: the chosen replies."},
    )
    num_train: int | None = field(default=None, metadata={"help": "Use so many training pairs."})
    num_test: int = field(default=500, metadata={"help": "Test prompts."})
    sft_epochs: float = field(default=1, metadata={"help": "Epochs of the supervised model."})
    sft_learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the supervised model."})
    sft_batch_size: int = field(default=128, metadata={"help": "Its rows a step, over all processes."})
    sft_on_prompts: bool = field(
        default=False, metadata={"help": "Whether it learns the prompts too, as a new model has to."}
    )
    rm_epochs: float = field(default=1, metadata={"help": "Epochs of the reward model."})
    rm_learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the reward model."})
    rm_batch_size: int = field(default=64, metadata={"help": "Its pairs a step, over all processes."})

    @property
    def has_utility(self) -> bool:
        """Whether the true utility of a reply is known."""
        return self.dataset == GENERATED

    @property
    def generator_settings(self) -> dict[str, Any]:
        return as_settings(self.dataset_kwargs)

    @property
    def data_settings(self) -> list[Any]:
        """What tells the data apart."""
        return [self.dataset, self.generator_settings, self.sft_dataset, self.num_train]

    @property
    def sft_settings(self) -> dict[str, Any]:
        """Of [`~sft.fine_tune`]."""
        return {
            "epochs": self.sft_epochs,
            "learning_rate": self.sft_learning_rate,
            "batch_size": self.sft_batch_size,
            "completion_only_loss": not self.sft_on_prompts,
        }

    @property
    def rm_settings(self) -> dict[str, Any]:
        """Of [`~reward_model.fit_reward_model`]."""
        return {"epochs": self.rm_epochs, "learning_rate": self.rm_learning_rate, "batch_size": self.rm_batch_size}

    def load(self, seed: int = 0) -> tuple[Dataset, Dataset, Dataset]:
        """
        Load the data.

        Args:
            seed (`int`, *optional*, defaults to `0`):
                Seeds what is made on the spot, but for the test prompts, which are always the same.

        Returns:
            `tuple` of three `Dataset`: demonstrations (`prompt`, `completion`), pairs (`prompt`, `chosen`,
            `rejected`), test prompts (`prompt`).

        Raises:
            `ValueError`: for settings or columns that do not fit.
        """
        settings = self.generator_settings
        for name in ("num_train", "num_test", *(f"{stage}_{what}" for stage in ("sft", "rm") for what in _PACE)):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}={value!r}: give more than 0.")
        if self.has_utility:
            if unknown := settings.keys() - {"n", "noise"}:
                raise ValueError(f"dataset_kwargs: {', '.join(sorted(unknown))} is unknown, choose from n and noise.")
            n = settings.pop("n", 4000)
            pairs = recommendation_pairs(n, seed, split="train", **settings)
            demonstrations = recommendation_demonstrations(n, seed, split="train")
            test = recommendation_pairs(self.num_test, split="test")
        else:
            if settings:
                raise ValueError(f'dataset_kwargs={settings} are settings of "{GENERATED}", not of {self.dataset!r}.')
            if Path(self.dataset).suffix in _BUILDERS and self.test_dataset is None:
                raise ValueError(f"dataset={self.dataset!r} is one file: name another to test on, --test_dataset.")
            pairs = _load(self.dataset, "train", COLUMNS)
            test = _load(self.test_dataset or self.dataset, self.test_split, ("prompt",))
            demonstrations = pairs.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
        if self.sft_dataset is not None:
            demonstrations = _load(self.sft_dataset, "train", ("prompt", "completion"))
        pairs = pairs.select(range(min(len(pairs) if self.num_train is None else self.num_train, len(pairs))))
        test = test.select_columns(["prompt"]).select(range(min(self.num_test, len(test))))
        return demonstrations, pairs, test


def _load(name: str, split: str, columns: Sequence[str]) -> Dataset:
    """Rows of a local file or of the Hub, with these columns of plain text and no others."""
    from datasets import load_dataset

    builder = _BUILDERS.get(Path(name).suffix)
    if builder is not None and not Path(name).exists():
        raise ValueError(f"There is no file {name!r}.")
    if builder is None:
        rows = load_dataset(name, split=split)
    else:
        try:
            rows = load_dataset(builder, data_files=name, split="train")
        except Exception as error:  # `StopIteration` of an empty file, and what not
            why = error.__cause__ or error
            raise ValueError(f"{name!r} cannot be read, or has no row: {type(why).__name__} {why}") from error
    if missing := [column for column in columns if column not in rows.column_names]:
        raise ValueError(
            f"{name!r} needs the columns {list(columns)}: {missing} are missing among {rows.column_names}."
        )
    if len(rows) == 0:
        raise ValueError(f"{name!r} has no row.")
    for column in columns:
        for number, value in enumerate(rows[column]):
            if not isinstance(value, str):
                raise ValueError(
                    f"Row {number} of {name!r} has {type(value).__name__} for {column!r}, and plain text is needed: "
                    "drop rows without, and render conversations with the model's chat template first."
                )
    return rows.select_columns(list(columns))
