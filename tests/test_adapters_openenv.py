# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""OpenEnv's environments: behind a stand-in client, and behind real servers in threads of this process."""

import functools
import json
import random
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from adapted import check_100_episodes, train_two_steps
from launching import free_port

from trl_agents.envs import make_env
from trl_agents.envs.adapters import OpenEnvEnvironment


# -- a stand-in client ------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    board: list
    legal_actions: list | None = None
    done: bool = False


class Client:
    """Synchronous, with typed observations, as the clients of OpenEnv's environments are."""

    def __init__(self, **kwargs):
        self.kwargs, self.given, self.closed = kwargs, [], 0

    def reset(self, **kwargs):
        self.given.append(kwargs)
        return SimpleNamespace(observation=Seen([0, 0], [3, 4]), reward=None, done=False)

    def step(self, action):
        self.given.append(action)
        done = len(self.given) > 2
        metadata = {"truncated": True} if done else None
        return SimpleNamespace(observation=Seen([1, 0], [4], done), reward=1, done=done, metadata=metadata)

    def close(self):
        self.closed += 1


def test_a_typed_client_by_hand():
    env = OpenEnvEnvironment(Client, action="action_id", base_url="x", instructions="Play.")
    assert env.client.kwargs == {"base_url": "x"} and env.instructions == "Play."
    assert env.reset(seed=3, options={"level": 1}) == ("board: [0, 0]", {"legal_actions": ["3", "4"]})
    assert env.step("4")[:4] == ("board: [1, 0]", 1.0, False, False)
    _, reward, terminated, truncated, info = env.step("4")
    assert (reward, terminated, truncated, info["legal_actions"]) == (1.0, False, True, [])
    assert env.client.given == [{"seed": 3, "level": 1}, {"action_id": 4}, {"action_id": 4}]  # the number, as it was
    env.close()
    assert env.client.closed == 1


def test_own_functions():
    env = OpenEnvEnvironment(
        Client,
        action=lambda text: SimpleNamespace(code=text),
        describe=lambda seen: f"{len(seen.board)} squares",
        legal_actions=lambda seen: ["go"],
    )
    assert env.reset() == ("2 squares", {"legal_actions": ["go"]})
    env.step("go")
    assert env.client.given[1].code == "go"


# -- real servers -----------------------------------------------------------------------------------------------------


def make_app(kind):
    server = pytest.importorskip("openenv.core.env_server", reason="OpenEnv is not installed: pip install openenv")

    class Said(server.Action):
        message: str

    class Text(server.Observation):
        text: str
        legal_actions: list[str] | None = None

    class Served(server.Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed=None, episode_id=None, **kwargs):
            self.rng, self.steps = random.Random(seed), 0
            return self.seen(f"Begin {self.rng.randint(0, 99)}")

        def step(self, action, timeout_s=None, **kwargs):
            self.steps += 1
            if kind == "echo":
                return self.seen(f"You said {action.message!r}", len(action.message) / 10, self.steps == 2)
            right = action.message == self.rng.choice("01")
            return self.seen("right" if right else "wrong", float(right), self.steps == 4 or kind == "once")

        def seen(self, text, reward=None, done=False):
            return Text(text=text, reward=reward, done=done, legal_actions=None if kind == "echo" else ["0", "1"])

        @property
        def state(self):
            return server.State()

    return server.create_fastapi_app(Served, Said, Text, max_concurrent_envs=32)


@pytest.fixture(scope="module", params=["coin", "once", "echo"])
def address(request):
    uvicorn = pytest.importorskip("uvicorn", reason="OpenEnv's server is not installed: pip install openenv")
    app = make_app(request.param)
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", ws="websockets-sansio")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.started
    yield request.param, f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(20)


ANSWERS = {"coin": None, "once": None, "echo": ["hello", "a", json.dumps({"x": 1})]}


def test_100_episodes(address):
    kind, url = address
    episodes = check_100_episodes(functools.partial(make_env, f"openenv:{url}"), answers=ANSWERS[kind])
    assert all(len(episode) == {"coin": 5, "once": 2, "echo": 3}[kind] for episode in episodes.values())
    assert all(episode[-1][2] for episode in episodes.values())


def test_trains(address, tmp_path):
    kind, url = address
    train_two_steps(f"openenv:{url}", tmp_path, "hello" if kind == "echo" else "1")


def test_mistakes():
    with pytest.raises(ValueError, match="'localhost:8000' is no address"):
        make_env("openenv:localhost:8000")


def test_no_server():
    pytest.importorskip("openenv.core", reason="OpenEnv is not installed: pip install openenv")
    env = make_env("openenv:http://127.0.0.1:9", connect_timeout_s=2.0)
    with pytest.raises(ConnectionError, match="did not answer.*Is it running"):
        env.reset(seed=0)
    env.close()
