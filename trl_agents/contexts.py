# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What the model reads each turn. A context turns an environment's text into token ids, and never re-tokenises a reply.

A context is shared by all episodes; what one episode has read so far is its `Reader`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


# For tokenizers without a chat template (base models): each message is a line, the reply ends with the EOS token.
PLAIN_CHAT_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}"
)

# Stands for a reply while the template is rendered around it; no template or tokenizer alters plain letters.
_REPLY = "trlagentsreply"

# Stands before what looks like a control token and is only text. No text has it: to Unicode it is no character.
_QUOTED = "\ufdd0"


@dataclass(frozen=True, slots=True)
class Briefing:
    """The texts of an environment that stay the same all episode long."""

    instructions: str
    history_header: str = "So far you have tried/seen:"
    question: str = ""

    @classmethod
    def of(cls, env: Any) -> Briefing:
        """Read the attributes of an environment; only `instructions` is required."""
        return cls(
            env.instructions,
            getattr(env, "history_header", cls.__dataclass_fields__["history_header"].default),
            getattr(env, "question", ""),
        )


class _Context:
    """What both contexts have: a tokenizer, and the messages framed by its chat template."""

    appends: bool  # whether later turns only add to what was read

    def __init__(self, tokenizer, eos_token_ids: list[int] | None = None, chat_template_kwargs: dict | None = None):
        self.tokenizer = tokenizer
        eos_token_ids = [tokenizer.eos_token_id] if eos_token_ids is None else eos_token_ids
        self.eos_token_ids = frozenset(eos_token_ids) - {None}
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        if getattr(tokenizer, "chat_template", None) is None:
            self.chat_template_kwargs.setdefault("chat_template", PLAIN_CHAT_TEMPLATE)
        controls = sorted(_control_tokens(tokenizer), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, controls)) or r"(?!)")
        self._quoted_control = re.compile(f"{_QUOTED}({self._control.pattern})")

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text around `messages`, in which [`encode`] reads only the template's own control tokens as such."""
        messages = [{**message, "content": self._quote(message["content"])} for message in messages]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
        )

    def encode(self, text: str) -> list[int]:
        """The ids of what [`render`] returned, or of a part of it."""
        if _QUOTED not in text:
            return self.tokenizer.encode(text, add_special_tokens=False)
        ids = []
        for number, part in enumerate(self._quoted_control.split(text)):
            plain = {"split_special_tokens": True} if number % 2 else {}
            ids += self.tokenizer.encode(part, add_special_tokens=False, **plain) if part else []
        return ids

    def encode_words(self, text: str) -> list[int]:
        """The ids of what somebody said: nothing in it is a control token, whatever it looks like."""
        return self.encode(self._quote(text))

    def _quote(self, text: str) -> str:
        return self._control.sub(lambda found: _QUOTED + found[0], text)

    def decode(self, ids: tuple[int, ...]) -> str:
        """The text of a reply, without the token that ended it."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def between(self, message: str, last_id: int | None) -> list[int]:
        """The ids from the end of a reply to the start of the next, around the user's `message`."""
        ids = self._encode_after_reply(self._after_reply(message))
        # The template closes the reply; a reply that closed itself must not be closed twice. Some templates put a
        # space before the closing token, hence the look a little further.
        if last_id in self.eos_token_ids:
            for position, token in enumerate(ids[:3]):
                if token == last_id:
                    return ids[position + 1 :]
        return ids

    def _after_reply(self, message: str) -> str:
        rendered = self.render(
            [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": _REPLY},
                {"role": "user", "content": message},
            ]
        )
        _, found, rest = rendered.partition(_REPLY)
        if not found:
            raise ValueError("The chat template leaves out the assistant's messages: use one that shows them.")
        return rest

    def _encode_after_reply(self, text: str) -> list[int]:
        # Some tokenizers treat the start of a text as the start of a word
        reply, both = self.encode(_REPLY), self.encode(_REPLY + text)
        return both[len(reply) :] if both[: len(reply)] == reply else self.encode(text)

    def reply_ids(self, text: str) -> list[int]:
        """The ids of a reply that somebody else writes in the model's place, as if the model had ended it."""
        ids = self._encode_after_reply(self._after_reply("?"))
        closing = [token for token in ids[:3] if token in self.eos_token_ids]
        return [*self.encode_words(text), *(closing or [self.tokenizer.eos_token_id or min(self.eos_token_ids)])[:1]]

    def begin(self, briefing: Briefing, observation: str, info: Mapping[str, Any]):
        raise NotImplementedError


def _control_tokens(tokenizer: Any) -> set[str]:
    """What a tokenizer does not read letter by letter, because it begins or ends messages and the like."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*getattr(tokenizer, "all_special_tokens", ()), *(token.content for token in added if token.special)} - {""}


class ChatContext(_Context):
    """
    The conversation grows: each turn adds the environment's reply as a user message.

    The ids of a turn are the ids of the last one, the sampled ids as they are, and the ids of what the template puts
    between a reply and the next: `old ids + sampled ids + new ids`. One sequence holds the whole episode.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its chat template frames the messages; without one, [`PLAIN_CHAT_TEMPLATE`] does.
        eos_token_ids (`list[int]`, *optional*):
            Tokens that end a reply. Defaults to the tokenizer's own.
        chat_template_kwargs (`dict`, *optional*):
            Passed on to the chat template (for example `enable_thinking`).
    """

    appends = True

    def begin(self, briefing: Briefing, observation: str, info: Mapping[str, Any]) -> ChatReader:
        message = {"role": "user", "content": opening_message(briefing, observation)}
        return ChatReader(self, self.encode(self.render([message])))


class ChatReader:
    """What one episode has read and written so far, as one growing list of ids."""

    def __init__(self, context: ChatContext, prompt_ids: list[int]):
        self.context = context
        self.prompt_ids = prompt_ids  # all the model reads at this turn
        self.input_ids = prompt_ids  # what of it is new since the last sampled token

    def observe(
        self, reply_ids: tuple[int, ...], executed: str | None, reward: float, observation: str, info, note: str = ""
    ) -> None:
        """The environment answered: its observation, and `note` behind it, is the next user message."""
        self.ask(reply_ids, "\n".join(part for part in (observation, note) if part))

    def ask(self, reply_ids: tuple[int, ...], message: str) -> None:
        """Go on with `message` without a step of the environment (asking again after an invalid action)."""
        self.input_ids = self.context.between(message, reply_ids[-1] if reply_ids else None)
        self.prompt_ids = [*self.prompt_ids, *reply_ids, *self.input_ids]

    def reconsider(self, reply_ids: tuple[int, ...], message: str) -> None:
        """Let the model answer anew after `message`: its reply so far is only something it reads."""
        read = self.input_ids
        self.ask(reply_ids, message)
        self.input_ids = [*read, *reply_ids, *self.input_ids]


class WindowContext(_Context):
    """
    The prompt is rendered anew each turn: instructions, the last C transitions a line each, the open step, the
    closing question (the form of [LLMs are Greedy Agents](https://huggingface.co/papers/2504.16078), section 3.1:
    c_t = [input instruction; output instruction; last C transitions]). Thoughts are not kept.

    A line is the environment's `info["transition"]` when it gives one, else `Step=k State=.. Action=.. Reward=..`.

    Args:
        tokenizer, eos_token_ids, chat_template_kwargs:
            As for [`ChatContext`].
        window (`int`, *optional*):
            C, the number of transitions kept. None keeps all, as the paper's budget of 1,792 tokens does for 50 steps;
            0 keeps only the open step, which is enough where a state says it all.
    """

    appends = False

    def __init__(
        self,
        tokenizer,
        eos_token_ids: list[int] | None = None,
        chat_template_kwargs: dict | None = None,
        window: int | None = None,
    ):
        super().__init__(tokenizer, eos_token_ids, chat_template_kwargs)
        if window is not None and window < 0:
            raise ValueError(f"window={window!r} is no number of transitions: give 0 or more, or None to keep all.")
        self.window = window

    def begin(self, briefing: Briefing, observation: str, info: Mapping[str, Any]) -> WindowReader:
        return WindowReader(self, briefing, observation, info)


class WindowReader:
    """What one episode may look back on: its transitions, a line each, and the step that is open."""

    def __init__(self, context: WindowContext, briefing: Briefing, observation: str, info: Mapping[str, Any]):
        self.context, self.briefing = context, briefing
        self.lines: list[str] = []
        self.open = self.observation = observation
        self.note = self.message = ""
        self.names: Mapping[str, str] = {}
        self._render()

    def observe(
        self, reply_ids: tuple[int, ...], executed: str | None, reward: float, observation: str, info, note: str = ""
    ) -> None:
        """The environment answered: the open step becomes a line, the observation opens the next, `note` follows."""
        self.lines.append(transition_line(len(self.lines), self.observation, executed, reward, info))
        self.observation, self.note, self.message = observation, note, ""
        self.open = observation.removeprefix(self.lines[-1]).strip("\n")
        self._render()

    def ask(self, reply_ids: tuple[int, ...], message: str) -> None:
        """Ask the open step again, with `message` beside it."""
        self.message = message
        self._render()

    def rename(self, names: Mapping[str, str]) -> None:
        """Call the actions of the history (`Action=X`) otherwise at this turn."""
        self.names = names
        self._render()

    def reconsider(self, reply_ids: tuple[int, ...], message: str) -> None:
        """Let the model answer anew after `message`: its reply so far is only something it reads."""
        between = self.context.between(message, reply_ids[-1] if reply_ids else None)
        self.input_ids = self.prompt_ids = [*self.prompt_ids, *reply_ids, *between]

    def _render(self) -> None:
        *lines, step, note = (rename_actions(line, self.names) for line in (*self.lines, self.open, self.note))
        lines = last(lines, self.context.window)
        told = "\n".join(part for part in (note, self.message) if part)
        text = window_message(self.briefing, lines, step, told)
        self.prompt_ids = self.context.encode(self.context.render([{"role": "user", "content": text}]))
        self.input_ids = self.prompt_ids


def make_context(
    name: str,
    tokenizer,
    eos_token_ids: list[int] | None = None,
    chat_template_kwargs: dict | None = None,
    window: int | None = None,
) -> ChatContext | WindowContext:
    """The context that a configuration calls `name`: `"chat"` or `"window"`."""
    if name == "chat":
        return ChatContext(tokenizer, eos_token_ids, chat_template_kwargs)
    if name == "window":
        return WindowContext(tokenizer, eos_token_ids, chat_template_kwargs, window)
    raise ValueError(f'context={name!r} is unknown: choose "chat" or "window".')


def opening_message(briefing: Briefing, observation: str) -> str:
    """The first user message of a growing conversation."""
    return "\n".join(part for part in (briefing.instructions, observation, briefing.question) if part)


def window_message(briefing: Briefing, lines: Sequence[str], open_step: str = "", note: str = "") -> str:
    """The one user message of a turn that looks back on `lines`, in the paper's order (figure 2)."""
    history = [*lines, open_step] if open_step else list(lines)
    header = [briefing.history_header] if history else []
    parts = [briefing.instructions, *header, *history, note, briefing.question]
    return "\n".join(part for part in parts if part)


def last(lines: Sequence[str], window: int | None) -> Sequence[str]:
    """The last `window` of the lines; all for None."""
    return lines if window is None else lines[max(len(lines) - window, 0) :]


def transition_line(step: int, observation: str, action: str | None, reward: float, info: Mapping[str, Any]) -> str:
    """One transition as a line: the environment's own `info["transition"]`, else made of its parts."""
    if "transition" in info:
        return info["transition"]
    state = f" State={observation}" if observation else ""
    return f"Step={step}{state} Action={action} Reward={format_reward(reward)}"


def rename_actions(text: str, names: Mapping[str, str]) -> str:
    """Call the actions of a history (`Action=X`) as `names` says."""
    if not names:
        return text
    either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.sub(rf"(?<=Action=)({either})(?=\s|$)", lambda found: names[found[0]], text)


def format_reward(reward: float) -> str:
    """Whole numbers as such, others with two decimals, as the paper shows them (figure 22)."""
    text = f"{reward:.0f}" if float(reward).is_integer() else f"{reward:.2f}"
    return text.removeprefix("-") if float(text) == 0 else text
