# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The episode browser: one static HTML page on which episodes are read turn by turn, searched and filtered.

[`episode_record`] is the one way from a [`Trajectory`] to what the page shows. A record is a row of an episodes file
(the form is described in `episode_file.py`, whose `read_episodes` reads it) with what else is known: `player`, and for
each turn `regret`, `optimal`, `penalty`, where the reply was invalid the `legal_actions`, and what an exploration
mechanism did: `forced`, `bonus`, `drafts`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .page import asset, describe_env, html_page, write_text
from .types import Trajectory, Turn


if TYPE_CHECKING:
    from .episodes import LoggedEpisode


# Where the reply comes to its point: from the last statement of an action on, or else behind a reasoning model's
# thinking. Only for the eye, as the page sets thought and statement apart; what counts was parsed before.
_HEADS = ("ACTION", "Action", "action")
_STATES = re.compile(r"[*_`]{0,3}\s{0,8}[=:]")  # what follows one
_THOUGHT_ENDS = "</think>"


def episode_record(
    trajectory: Trajectory,
    *,
    player: str = "",
    env_id: str | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """
    What is shown of an episode, and what an episodes file says of it.

    Args:
        trajectory ([`Trajectory`]):
            The episode.
        player (`str`, *optional*):
            Who played.
        env_id (`str`, *optional*):
            Where it was played.
        env_kwargs (`Mapping`, *optional*):
            The environment's arguments.
        more (*optional*):
            Further fields of the row, such as the `question` and `history_header` of a [`Briefing`].

    Returns:
        `dict`: A row for [`write_records`], [`write_page`] and `json.dumps`.
    """
    record = {
        "player": player,
        "env_id": env_id,
        "env_kwargs": dict(env_kwargs or {}),
        "seed": trajectory.seed,
        "return": trajectory.return_,
        "stop": trajectory.stop.value,
        "instructions": trajectory.instructions,
        **more,
        "turns": [],
        "final_observation": trajectory.final_observation,
    }
    if trajectory.error:
        record["error"] = trajectory.error
    legal_actions = trajectory.reset_info.get("legal_actions")
    for turn in trajectory.turns:
        record["turns"].append(_turn_record(turn, legal_actions))
        legal_actions = turn.info.get("legal_actions", legal_actions)
    return record


def _turn_record(turn: Turn, legal_actions: Sequence[str] | None) -> dict[str, Any]:
    record = {
        "observation": turn.observation,
        "text": turn.text,
        "action": turn.executed,
        "reward": turn.reward,
        "valid": turn.parsed.is_valid,
    }
    if not turn.parsed.is_valid:
        record["reason"] = turn.parsed.reason.value
        record |= {"penalty": turn.penalty} if turn.penalty else {}
        record |= {"legal_actions": list(legal_actions)} if legal_actions else {}
    record |= {name: storable(turn.info[name]) for name in ("transition", "regret", "optimal") if name in turn.info}
    record |= {name: True for name in ("cut_off", "forced") if getattr(turn, name)}
    record |= {"bonus": turn.bonus} if turn.bonus else {}
    record |= {"drafts": list(turn.drafts)} if turn.drafts else {}
    record |= {"action_ids": list(turn.action_ids)} if turn.action_ids else {}
    return record


def write_records(path: str | Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write `records` to an episodes file, an episode a line. The file is there when it is whole, or not at all."""
    rows = (json.dumps(storable(record), default=str) for record in records)
    return write_text(path, "".join(f"{row}\n" for row in rows))


def read_records(path: str | Path, player: str = "") -> list[dict[str, Any]]:
    """
    Read a file of episodes, in any of the forms that `episode_file.py` describes.

    Args:
        path (`str` or `Path`):
            JSON lines, an episode a line.
        player (`str`, *optional*):
            Who played, where the file does not say so.

    Raises:
        `ValueError`: with the number of the line, for one that is no episode.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(
            f"{path} is no episodes file: it is not text. Give a .jsonl file, an episode a line."
        ) from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits
            raise ValueError(f"{path}, line {number}: this is no JSON ({error}).") from None
        if not (isinstance(row, dict) and _is_episode(row)):
            raise ValueError(
                f"{path}, line {number}: this is no episode, which has `turns`, `messages`, or `prompt` and "
                "`completion`, with a `text` in each turn."
            )
        records.append({**row, "player": row.get("player") or player})
    if not records:
        raise ValueError(f"{path} holds no episode.")
    return records


def _is_episode(row: Mapping[str, Any]) -> bool:
    def all_have(name: str, value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(one, dict) and name in one for one in value)

    if "turns" in row:
        return all_have("text", row["turns"])
    return all_have("role", row.get("messages")) or ("prompt" in row and "completion" in row)


def write_page(
    path: str | Path,
    episodes: Iterable[Trajectory | LoggedEpisode | Mapping[str, Any]],
    *,
    title: str = "Episodes",
    player: str = "",
    env_id: str | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
) -> Path:
    """
    Write the page of an episode browser: one HTML file that needs nothing else, also without a network.

    Args:
        path (`str` or `Path`):
            File to write.
        episodes (`Iterable`):
            [`Trajectory`] values, episodes of `read_episodes`, or records of [`read_records`] and [`episode_record`].
        title (`str`, *optional*, defaults to `"Episodes"`):
            What the page is headed.
        player, env_id, env_kwargs (*optional*):
            Who played where, for episodes that do not say it.

    Returns:
        `Path` of the file.
    """
    of_all = {"player": player, "env_id": env_id, "env_kwargs": env_kwargs}
    summaries, data, standing = [], [], {}
    for number, episode in enumerate(episodes):
        shown = _shown(_as_record(episode, of_all))
        # Instructions are as a rule the same in all episodes: each is stored once
        shown["instructions"] = standing.setdefault(shown["instructions"], len(standing))
        summaries.append(_summary(shown))
        data.append((f"episode-{number}", shown))
    index = {"title": title, "episodes": summaries, "instructions": list(standing)}
    styles = ["page.css", "viewer.css"]
    body = asset("viewer.html")
    return write_text(path, html_page(title, body, styles=styles, script="viewer.js", data=[*data, ("index", index)]))


def _as_record(episode: Trajectory | LoggedEpisode | Mapping[str, Any], of_all: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(episode, Trajectory):
        return episode_record(episode, **of_all)
    if isinstance(episode, Mapping):
        given = {name: storable(value) for name, value in episode.items()}
        return {**of_all, **{name: value for name, value in given.items() if value not in (None, "")}}
    if episode.trajectory is not None:
        env = {"env_id": episode.env_id or of_all["env_id"], "env_kwargs": episode.env_kwargs or of_all["env_kwargs"]}
        return episode_record(episode.trajectory, **{**of_all, **env})
    row = {"messages": list(episode.messages)} if episode.messages else {"prompt": episode.prompt}
    return {**of_all, **row, "completion": episode.completion, "given": episode.given, "reward": episode.reward}


# -- what the page is given -------------------------------------------------------------------------------------------


def _shown(record: Mapping[str, Any]) -> dict[str, Any]:
    """An episode as the page's script reads it: known fields only, each of the type that is meant."""
    turns = list(_turns(record))
    rewards = [turn["reward"] for turn in turns if isinstance(turn["reward"], (int, float))]
    regrets = [turn["regret"] for turn in turns if isinstance(turn.get("regret"), (int, float))]
    return_ = record.get("return", record.get("reward"))
    env_kwargs = record.get("env_kwargs")
    env = describe_env(_text(record.get("env_id")), env_kwargs if isinstance(env_kwargs, Mapping) else {})
    return {
        "player": _text(record.get("player")),
        "env": env,
        "seed": _text(record.get("seed")),
        "return": _number(_sum(rewards) if return_ is None else return_),
        "regret": _number(_sum(regrets)) if regrets else None,
        "stop": _text(record.get("stop")),
        "error": _text(record.get("error")),
        "instructions": _text(record.get("instructions")),
        "turns": turns,
        "final": _text(record.get("final_observation")),
    }


def _turns(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if "turns" in record:
        for turn in record["turns"]:
            yield _shown_turn(turn)
        return
    if "messages" in record:
        messages, given = record["messages"], record.get("given", 0)
    else:
        prompt, completion = record["prompt"], record["completion"]
        prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        given = len(prompt)
        messages = [*prompt, *(completion if isinstance(completion, list) else [_reply(completion)])]
    read: list[str] = []
    for number, message in enumerate(messages):
        message = message if isinstance(message, Mapping) else {"role": "user", "content": message}
        role, content = _text(message.get("role")), _text(message.get("content"))
        if role == "assistant" and number >= given:
            yield _shown_turn({"observation": "\n\n".join(read), "text": content, "reward": None})
            read = []
        else:
            read.append(content if role == "user" else f"[{role}]\n{content}")


def _reply(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _shown_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    text, info = _text(turn.get("text")), turn.get("info")
    info = info if isinstance(info, Mapping) else {}
    thought, said = _split(text)
    reward = turn.get("reward")
    shown = {
        "read": _text(turn.get("observation")),
        "thought": thought,
        "said": said,
        "action": _text(turn.get("action")) if turn.get("action") is not None else None,
        "reward": _number(reward) if reward is not None else None,
        "valid": turn.get("valid", True) is not False,
    }
    if not shown["valid"]:
        shown["reason"] = _text(turn.get("reason")) or "no_match"
        legal_actions = turn.get("legal_actions")
        shown["legal"] = [_text(action) for action in legal_actions] if isinstance(legal_actions, list) else []
        shown["penalty"] = _number(turn.get("penalty") or 0)
    for name in ("regret", "optimal"):
        value = turn.get(name, info.get(name))
        if value is not None:
            shown[name] = bool(value) if name == "optimal" else _number(value)
    drafts = turn.get("drafts")
    if isinstance(drafts, list) and drafts:
        shown["drafts"] = "\n\n".join(_text(draft) for draft in drafts)
    if turn.get("bonus"):
        shown["bonus"] = _number(turn["bonus"])
    return shown | {name: True for name in ("cut_off", "forced") if turn.get(name)}


def _split(text: str) -> tuple[str, str]:
    """The thought, and the statement that it ends in."""
    start = text.rfind(_THOUGHT_ENDS)
    start = start + len(_THOUGHT_ENDS) if start >= 0 else 0
    start = max(start, *(_last_statement(text, head, start) for head in _HEADS))
    return text[:start].rstrip(), text[start:].lstrip("\n")


def _last_statement(text: str, head: str, start: int) -> int:
    """Where the last `head` is that states an action, with the emphasis around it; -1 if none is."""
    at = text.rfind(head, start)
    while at >= 0:
        inside = at > 0 and text[at - 1].isalnum() and head.islower()  # "reaction: ..." states none
        if not inside and _STATES.match(text, at + len(head)):
            return start + len(text[start:at].rstrip("*_`"))
        at = text.rfind(head, start, at)
    return -1


def _summary(shown: Mapping[str, Any]) -> dict[str, Any]:
    fields = ("player", "env", "seed", "return", "regret", "stop")
    turns = shown["turns"]
    return {
        **{name: shown[name] for name in fields},
        "turns": len(turns),
        "invalid": sum(not turn["valid"] for turn in turns),
    }


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _number(value: Any) -> float | str:
    """JSON knows no infinity and no NaN: those become their names."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _text(value)
    try:
        return value if math.isfinite(value) else str(value)
    except OverflowError:  # an integer beyond all floats
        return str(value)


def _sum(values: Sequence[float]) -> float:
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def storable(value: Any) -> Any:
    """NumPy's numbers, which environments put into `info`, as Python's."""
    if isinstance(value, Mapping):
        return {str(name): storable(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [storable(one) for one in value]
    return value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value
