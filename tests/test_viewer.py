# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The episode browser: what a record holds, what files are read, and the page in a real browser."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from browser import Browser, needs_chromium

from trl_agents.agents import RandomAgent, play_episode
from trl_agents.envs import make_env
from trl_agents.page import as_data, html_page
from trl_agents.types import InvalidReason, ParsedAction, StopReason, Trajectory, Turn
from trl_agents.viewer import episode_record, read_records, write_page, write_records


ENV = "trl_agents/Bandit-v0"

INJECTIONS = [
    "<img src=x onerror=\"document.title='owned'\">",
    "</script><script>document.title='owned'</script>",
    "<!--<script>",
    "]]><svg onload=\"document.title='owned'\">",
    '<a href="javascript:document.title=1">javascript:document.title=1</a>',
    "\u2028\u2029 \ud800 half a character, \x00 \x1b",
    "{{constructor.constructor('document.title=1')()}}",
    "<style>body{display:none}</style><base href='https://example.com/'>",
]


def make_turn(text, action="blue", valid=True, **more):
    parsed = ParsedAction(action) if valid else ParsedAction(None, InvalidReason.ILLEGAL, "mauve")
    return Turn("Step=0 Action=red Reward=1", (), (), text, parsed, action, **{"reward": 0.5, **more})


def make_episode(seed, texts, **more):
    turns = tuple(make_turn(text) for text in texts)
    return Trajectory(seed, turns, StopReason.TERMINATED, "Choose well.", "It is over.", **more)


@pytest.fixture
def played():
    env = make_env(ENV, n_arms=3, horizon=6)
    return [play_episode(env, RandomAgent(), seed=seed) for seed in range(3)]


# -- records ----------------------------------------------------------------------------------------------------------


def test_record_says_what_was_read_written_played_and_got(played):
    record = episode_record(played[1], player="random", env_id=ENV, env_kwargs={"n_arms": 3})
    assert (record["player"], record["seed"], record["stop"]) == ("random", 1, "terminated")
    assert record["return"] == pytest.approx(played[1].return_)
    assert record["instructions"].startswith("You face a bandit problem with 3 buttons")
    first, second = played[1].turns[:2]
    shown = record["turns"][1]
    assert (shown["observation"], shown["text"], shown["action"]) == (second.observation, second.text, second.executed)
    assert shown["observation"] == first.info["transition"]
    assert shown["regret"] == second.info["regret"] and shown["optimal"] == second.info["optimal"]
    assert record["final_observation"] == played[1].turns[-1].info["transition"]


def test_record_of_an_invalid_turn_has_its_reason_and_what_was_legal():
    legal = ["blue", "red"]
    turns = (
        make_turn("ACTION=blue", info={"legal_actions": ["red"]}),
        make_turn("ACTION=mauve", "red", valid=False, penalty=-5.0),
    )
    trajectory = Trajectory(0, turns, StopReason.TERMINATED, reset_info={"legal_actions": legal})
    valid, invalid = episode_record(trajectory)["turns"]
    assert valid["valid"] and "reason" not in valid and "legal_actions" not in valid
    assert (invalid["valid"], invalid["reason"], invalid["penalty"]) == (False, "illegal", -5.0)
    assert invalid["legal_actions"] == ["red"]  # what the turn before left, not what the episode began with


def test_a_file_of_records_is_an_episodes_file(played, tmp_path):
    """`read_episodes`, which training reads, takes it; NumPy's numbers in `info` do not stand in the way."""
    from trl_agents.episodes import read_episodes

    turns = tuple(replace(turn, info={**turn.info, "regret": np.float32(0.5)}) for turn in played[0].turns)
    records = [episode_record(replace(played[0], turns=turns), player="p", env_id=ENV, env_kwargs={"n_arms": 3})]
    records.append(episode_record(make_episode(5, ["hm. ACTION=blue"], error="it broke")))
    path = write_records(tmp_path / "episodes.jsonl", records)
    episodes = read_episodes(path)
    assert [turn.text for turn in episodes[0].trajectory.turns] == [turn.text for turn in played[0].turns]
    assert [turn.executed for turn in episodes[0].trajectory.turns] == [turn.executed for turn in played[0].turns]
    assert (episodes[0].env_id, episodes[0].env_kwargs, episodes[1].trajectory.error) == (
        ENV,
        {"n_arms": 3},
        "it broke",
    )
    assert read_records(path)[0]["turns"][0]["regret"] == 0.5


def page_data(path):
    """What a page holds, read as a browser would: each data script ends at the first `</script`."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script', text, re.DOTALL)
    return {name: json.loads(value) for name, value in found}


def test_page_reads_all_forms_of_an_episodes_file(tmp_path):
    rows = [
        {"turns": [{"text": "I try it.\n\n**ACTION=blue**", "reward": 2}], "seed": 3},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": "2"},
                {"role": "user", "content": "2+2?"},
                {"role": "assistant", "content": "<think>two and two</think>4"},
            ],
            "reward": 1.5,
        },
        {"prompt": "1+1?", "completion": "It is 2.", "reward": 1},
        {
            "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "given"}],
            "completion": [{"role": "assistant", "content": "learnt"}],
            "reward": float("nan"),
        },
    ]
    path = tmp_path / "logged.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    data = page_data(write_page(tmp_path / "page.html", read_records(path, player="logged")))
    index = data["index"]
    assert [one["player"] for one in index["episodes"]] == ["logged"] * 4
    assert [one["return"] for one in index["episodes"]] == [2, 1.5, 1, "nan"]
    assert [one["turns"] for one in index["episodes"]] == [1, 2, 1, 1]
    turns = [data[f"episode-{number}"]["turns"] for number in range(4)]
    assert (turns[0][0]["thought"], turns[0][0]["said"]) == ("I try it.", "**ACTION=blue**")
    assert turns[1][0]["read"] == "[system]\nBe brief.\n\n1+1?" and turns[1][0]["said"] == "2"
    assert turns[1][1]["read"] == "2+2?"
    assert (turns[1][1]["thought"], turns[1][1]["said"]) == ("<think>two and two</think>", "4")
    assert turns[3][0]["read"] == "a\n\n[assistant]\ngiven" and turns[3][0]["said"] == "learnt"


def test_page_takes_trajectories_records_and_logged_episodes(played, tmp_path):
    from trl_agents.episodes import log_answers, log_episodes

    logged = log_episodes(played[:1], ENV, {"n_arms": 3}) + log_answers(["1+1?"], [["2"]], [1.0])
    episodes = [played[0], episode_record(played[0], env_id=ENV, env_kwargs={"n_arms": 3}), *logged]
    of_all = {"player": "p", "env_id": ENV, "env_kwargs": {"n_arms": 3}}
    data = page_data(write_page(tmp_path / "page.html", episodes, **of_all))
    assert data["episode-0"] == data["episode-1"] == data["episode-2"]
    assert data["episode-0"]["env"] == f"{ENV} (n_arms=3)"
    assert len(data["index"]["instructions"]) == 2  # those of the bandit once, and none
    assert (data["episode-3"]["turns"][0]["read"], data["episode-3"]["turns"][0]["said"]) == ("1+1?", "2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no episode"),
        ("not json", "line 1: this is no JSON"),
        ('{"turns": []}\n[1]', "line 2: this is no episode"),
        ('{"a": 1}', "this is no episode"),
        ('{"turns": [{"observation": ""}]}', "this is no episode"),
        ('{"turns": 3}', "this is no episode"),
        ("[" * 100_000, "line 1: this is no JSON"),
        ('{"turns": ' + "9" * 5000 + "}", "line 1: this is no JSON"),
        (b"\x89PNG\xff\xfe", "it is not text"),
    ],
)
def test_what_is_no_episodes_file_is_named(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as raised:
        read_records(path)
    assert str(path) in str(raised.value)


def test_any_values_in_a_file_make_a_page(tmp_path):
    """The fields of a foreign file may hold anything; texts are shown, whatever they are."""
    turn = {"text": 5, "observation": [1], "action": {"a": 1}, "reward": "much", "valid": False, "reason": None}
    row = {
        "turns": [{**turn, "legal_actions": 7, "regret": float("inf"), "info": 3}],
        "seed": [],
        "return": {},
        "stop": 1,
    }
    odd = {"prompt": ["a"], "completion": ["b"], "player": 9, "env_kwargs": 4}
    data = page_data(write_page(tmp_path / "page.html", [row, odd]))
    assert data["episode-0"]["turns"][0]["said"] == "5" and data["episode-0"]["turns"][0]["regret"] == "inf"


def test_numbers_of_any_size_and_kind_make_a_page(tmp_path):
    turns = [{"text": "x", "observation": "", "action": "a", "valid": True, "reward": 1e308, "regret": 10**400}] * 2
    numpys = {"turns": [{**turns[0], "reward": np.float32(0.5)}], "seed": np.int64(3)}
    data = page_data(write_page(tmp_path / "page.html", [{"turns": turns}, numpys]))
    assert (data["episode-0"]["return"], data["episode-0"]["turns"][0]["regret"]) == ("inf", str(10**400))
    assert (data["episode-1"]["return"], data["episode-1"]["seed"]) == (0.5, "3")


def test_data_cannot_end_its_script():
    for text in INJECTIONS:
        stored = as_data({text: [text]})
        assert "<" not in stored and ">" not in stored and stored.isascii()
        assert json.loads(stored) == {text: [text]}


def test_policy_names_the_page_s_own_script_alone():
    page = html_page("A <title> & more", "<p></p>", styles=["page.css"], script="viewer.js", data=[("a", 1)])
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    assert "<title>A &lt;title&gt; &amp; more</title>" in page
    assert not re.search(r'\son\w+=|\sstyle="|https?://', page)


# -- the page in a browser --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    started = Browser()
    yield started
    started.close()


READY = "document.documentElement.dataset.applied"


def open_page(browser, path, fragment=""):
    browser.open(path, READY, fragment)


def apply(browser, script):
    """Change a filter, and wait until the page has applied it."""
    before = browser.run(READY)
    browser.run(script)
    browser.wait(f"{READY} !== '{before}'")


def rows(browser):
    return browser.run("[...document.querySelectorAll('#list .first > :first-child')].map((row) => row.textContent)")


def text_of(browser, selector):
    """What a person reads. A turn has no such text until the frame that first shows it (`content-visibility`)."""
    browser.run("new Promise((shown) => requestAnimationFrame(() => requestAnimationFrame(() => shown())))")
    return browser.run(f"[...document.querySelectorAll('{selector}')].map((one) => one.innerText).join('|')")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Five episodes of two players: one with an invalid turn, one with a needle in a long thought."""
    episodes = [
        episode_record(make_episode(seed, ["so. ACTION=blue"] * 4), player="first", env_id=ENV) for seed in (7, 8)
    ]
    turns = (make_turn("ACTION=blue"), make_turn("ACTION=mauve", "red", valid=False, penalty=-5.0))
    ended = Trajectory(9, turns, StopReason.MAX_TURNS, "Choose well.", reset_info={"legal_actions": ["blue", "red"]})
    episodes.append(episode_record(ended, player="second", env_id=ENV))
    long = f"{'word ' * 1500}Needle (.*) in hay. {'word ' * 1500}\nACTION=blue"
    episodes.append(episode_record(make_episode(10, ["ACTION=blue", long]), player="second", env_id=ENV))
    episodes.append(episode_record(make_episode(11, ["ACTION=blue"] * 60), player="second", env_id=ENV))
    return write_page(tmp_path_factory.mktemp("page") / "page.html", episodes, title="A run")


@needs_chromium
def test_page_shows_an_episode_turn_by_turn(browser, page):
    open_page(browser, page, "#3")
    assert browser.run("document.title") == "A run"
    assert rows(browser) == ["1. first", "2. first", "3. second", "4. second", "5. second"]
    assert text_of(browser, "#episode h2") == "Episode 3: second"
    assert browser.run("document.querySelector('.instructions .text').textContent") == "Choose well."
    facts = text_of(browser, ".facts").split()
    assert facts[facts.index("Seed") + 1] == "9" and "max_turns" in facts
    invalid = text_of(browser, ".turn.invalid")
    assert "invalid: not a legal action" in invalid and "⚠" in invalid  # words and a sign, not colour alone
    assert "ACTION=mauve" in invalid and "in its place, by chance: red" in invalid and "Legal: blue, red" in invalid
    assert "reward 0.50 · penalty -5" in invalid
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith("file:")] == [] and len(browser.requests) == 1


@needs_chromium
def test_what_an_exploration_mechanism_did_is_told(browser, tmp_path):
    turns = (
        make_turn("I try it. ACTION=blue", forced=True),
        make_turn("ACTION=blue", bonus=1.0, drafts=("<b>red</b>",)),
    )
    episode = Trajectory(1, turns, StopReason.TERMINATED, "Choose well.", reset_info={"legal_actions": ["blue"]})
    open_page(browser, write_page(tmp_path / "page.html", [episode]))
    forced, own = text_of(browser, ".turn").split("|")
    assert "mechanism wrote this reply" in forced and "Drafts" not in forced
    assert "mechanism wrote" not in own and "bonus 1" in own and "Drafts" in own and "<b>red</b>" in own
    apply(browser, "search.value = '<b>RED', search.dispatchEvent(new Event('input'))")
    assert len(rows(browser)) == 1 and text_of(browser, ".drafts mark") == "<b>red"
    assert browser.errors == []


@needs_chromium
def test_filters(browser, page):
    open_page(browser, page)

    def choose(name, value):
        element = f"document.getElementById('{name}')"  # `stop` alone is the window's
        apply(browser, f"{element}.value = '{value}', {element}.dispatchEvent(new Event('change'))")

    choose("player", "second")
    assert rows(browser) == ["3. second", "4. second", "5. second"]
    assert text_of(browser, "#count") == "3 of 5 episodes"
    choose("stop", "max_turns")
    assert rows(browser) == ["3. second"] and text_of(browser, "#episode h2") == "Episode 3: second"
    choose("stop", "")
    choose("player", "")
    apply(browser, "document.getElementById('invalid').click()")
    assert rows(browser) == ["3. second"]
    assert text_of(browser, ".turn h3") == "Turn 2"  # of its two turns the invalid one
    assert "1 valid turn is hidden" in text_of(browser, ".end")
    apply(browser, "document.getElementById('invalid').click()")
    apply(browser, "seed.value = '8', seed.dispatchEvent(new Event('input'))")
    assert rows(browser) == ["2. first"]
    apply(browser, "seed.value = '12', seed.dispatchEvent(new Event('input'))")
    assert rows(browser) == [] and browser.run("!empty.hidden") and browser.errors == []


@needs_chromium
def test_search_finds_text_literally_and_shows_where(browser, page):
    open_page(browser, page)
    apply(browser, "search.value = 'nEEDLE (.*)', search.dispatchEvent(new Event('input'))")
    assert rows(browser) == ["4. second"]
    assert text_of(browser, "mark") == "Needle (.*)"  # also within the part of a thought that is folded otherwise
    apply(browser, "search.value = 'nowhere', search.dispatchEvent(new Event('input'))")
    assert rows(browser) == []
    apply(browser, "search.value = 'choose WELL', search.dispatchEvent(new Event('input'))")
    assert len(rows(browser)) == 5 and browser.run("document.querySelector('.instructions').open")
    for text in ("[", "\\", "(?:", "-", "/", "{"):  # what a regular expression would stumble over
        apply(browser, f"search.value = {json.dumps(text)}, search.dispatchEvent(new Event('input'))")
    assert browser.errors == []


@needs_chromium
def test_long_texts_are_folded_and_long_episodes_drawn_as_they_are_read(browser, page):
    open_page(browser, page, "#4")
    assert browser.run("document.querySelector('.thought .text').textContent.length") < 1000
    browser.run("document.querySelector('.more').click()")
    assert browser.run("document.querySelector('.thought .text').textContent.length") > 15_000
    open_page(browser, page, "#5")
    browser.wait("document.querySelectorAll('.turn').length > 0")
    assert browser.run("document.querySelectorAll('.turn').length") < 60
    browser.run(
        "new Promise((done) => { const step = () => { main.scrollTo(0, 1e6);"
        " document.querySelectorAll('.turn').length < 60 ? setTimeout(step, 20) : done(); }; step(); })"
    )
    assert "It is over." in text_of(browser, ".end")


@needs_chromium
def test_keys(browser, page):
    open_page(browser, page)

    def heading():
        return text_of(browser, "#episode h2").split(":")[0]

    browser.press("j")
    browser.press("j")
    assert heading() == "Episode 3" and browser.run("location.hash") == "#3"
    browser.press("i")
    assert browser.run("document.activeElement.id") == "turn-1"
    browser.press("p")
    assert browser.run("document.activeElement.id") == "turn-0"
    browser.press("k")
    assert heading() == "Episode 2"
    browser.press("/")
    assert browser.run("document.activeElement.id") == "search"
    browser.press("j")  # typed, and no command here
    browser.wait(f"search.value === 'j' && {READY} !== '1'")
    assert heading() == "Episode" or heading() == ""
    browser.press("Escape")
    assert browser.run("document.activeElement === document.body")
    browser.press("?")
    assert browser.run("help.open") and browser.errors == []


@needs_chromium
def test_nothing_a_model_writes_runs(browser, tmp_path):
    episodes = []
    for seed, text in enumerate(INJECTIONS):
        turns = (replace(make_turn(text, text), observation=text), make_turn(text, text, valid=False))
        trajectory = Trajectory(seed, turns, StopReason.ENV_ERROR, text, text, error=text)
        episodes.append(episode_record(trajectory, player=text, env_id=text, env_kwargs={text: text}))
    open_page(browser, write_page(tmp_path / "page.html", episodes, title="</title><script>document.title=1</script>"))
    for position, text in enumerate(INJECTIONS):
        browser.run(f"document.querySelector('[data-position=\"{position}\"]').click()")
        shown = browser.run("document.querySelector('.said .text').textContent")
        assert shown == text.replace("\ud800", "\ufffd") or text in shown  # half a character cannot leave the browser
        assert browser.run("document.querySelectorAll('#episode :is(img, svg, a, script, style, base)').length") == 0
    assert browser.run("document.title") == "</title><script>document.title=1</script>"
    assert browser.run("document.scripts.length") == len(INJECTIONS) + 2  # their data, the index, the page's own
    assert browser.errors == [] and len(browser.requests) == 1
    # The policy stops what would get past the escaping, and the browser says so
    browser.run(
        "document.body.insertAdjacentHTML('beforeend', '<img src=\"https://example.com/x.png\" onerror=\"owned=1\">')"
    )
    browser.wait("true")
    assert (
        any("Content Security Policy" in error for error in browser.errors)
        and browser.run("typeof owned") == "undefined"
    )


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_at_both_widths_in_both_schemes(browser, page, scheme):
    """Nothing is wider than the screen, and text stands out from its background (WCAG's 4.5 to 1)."""
    for width in (1280, 390):
        browser.set_screen(width, scheme=scheme)
        open_page(browser, page, "#3")
        assert browser.run("document.documentElement.scrollWidth") == width
        assert browser.run("main.scrollWidth <= main.clientWidth")
        inside = "(one) => one.getBoundingClientRect().right <= innerWidth"  # a card would clip what is wider
        assert browser.run(f"[...document.querySelectorAll('#episode *')].every({inside})")
        for selector in (".turn h3", ".turn .got", ".badge", ".label", ".facts dt", ".note"):
            assert contrast(browser, selector) >= 4.5, (width, scheme, selector)
    assert browser.run("getComputedStyle(side).display") == "none"  # a narrow screen shows the episode alone
    browser.run("back.click()")
    assert browser.run("getComputedStyle(side).display !== 'none' && getComputedStyle(main).display === 'none'")
    browser.set_screen(1280)


def contrast(browser, selector):
    colours = browser.run(
        f"(() => {{ let one = document.querySelector('{selector}'); const text = getComputedStyle(one).color;"
        " while (getComputedStyle(one).backgroundColor === 'rgba(0, 0, 0, 0)') one = one.parentElement;"
        " return [text, getComputedStyle(one).backgroundColor]; })()"
    )
    lights = []
    for colour in colours:
        channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


@needs_chromium
def test_big_files_open_as_fast_as_small_ones(browser, tmp_path):
    """
    500 episodes of 50 turns, and one of 50 turns with thoughts of about 2,000 tokens: the script is done within five
    times what it takes on a page of one short episode, and what a busy machine may add. (All 25,000 turns at once take
    several times that.) Rounds alternate, so that all pages meet the same load; the best of each counts.
    """
    thought = "A thought of a few words again. " * 250 + "ACTION=blue"
    small = [episode_record(make_episode(0, ["ACTION=blue"] * 3))]
    many = [episode_record(make_episode(seed, ["I try it. ACTION=blue"] * 50)) for seed in range(500)]
    long = [episode_record(make_episode(0, [thought] * 50))]
    pages = {"small": small, "many": many, "long": long}
    paths = {name: write_page(tmp_path / f"{name}.html", episodes) for name, episodes in pages.items()}
    rounds = [{name: time_to_interactive(browser, path) for name, path in paths.items()} for _ in range(6)]
    took = {name: min(one[name] for one in rounds) for name in paths}
    assert max(took["many"], took["long"]) < 5 * took["small"] + 150, took
    open_page(browser, tmp_path / "many.html")
    assert browser.run("document.querySelectorAll('#list button').length") < 500  # the list, too, as it is read


def time_to_interactive(browser, path):
    """Milliseconds from where the page's script starts to where it listens to the user."""
    open_page(browser, path)
    return browser.run("performance.measure('t', 'start', 'ready').duration")
