# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What TRL's model card does not know of a model that was made on the spot, or that lies in a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


QUICK_START = re.compile(r"## Quick start\n.*?\n(?=## Training procedure)", re.DOTALL)
NO_BASE = " version of [None](https://huggingface.co/None)"
LOAD = """\
## Quick start

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{model}")
tokenizer = AutoTokenizer.from_pretrained("{model}")
```
"""


def card_name(args: Any) -> str:
    """What a card calls the model of a trainer with these arguments: its repository's name, or its folder's."""
    return (args.hub_model_id or Path(args.output_dir).absolute().name).rpartition("/")[2]


def correct_card(folder: str | Path, model: str, quick_start: str | None = None) -> None:
    """
    Correct the card that TRL has written to `folder`, if it has.

    Args:
        folder (`str` or `Path`):
            The model's.
        model (`str`):
            Where the model is loaded from: a repository or a folder.
        quick_start (`str`, *optional*):
            Markdown in place of TRL's quick start. By default a language model that was trained from no model of the
            Hub is loaded there and not asked TRL's question, for it may know no more than the words of one game.
    """
    card = Path(folder) / "README.md"
    if not card.exists():
        return
    text = written = card.read_text(encoding="utf-8")
    if quick_start is None and NO_BASE in text and '"text-generation"' in text:
        quick_start = LOAD.format(model=model)
    if quick_start is not None:
        text = QUICK_START.sub(lambda _: f"{quick_start}\n", text)
    text = text.replace(NO_BASE, " language model").replace('model="None"', f'model="{model}"')
    if text != written:  # a push may be reading it
        card.write_text(text, encoding="utf-8")
