"use strict";
// The episodes stand in JSON scripts, one each, and are parsed when they are looked at: a big file opens as fast as a
// small one. Foreign text becomes text nodes only, by `make` below; there is no innerHTML in this file.
(() => {
  performance.mark("start");
  const get = (id) => document.getElementById(id);
  const stored = (id) => JSON.parse(get(id).textContent);
  const index = stored("index");
  const LONG = 700; // characters of a text that are shown before it is unfolded, and as many as are hidden at least
  const AT_ONCE = 12; // turns that are drawn at a time
  const ROWS = 150; // rows of the list likewise
  const REASONS = {
    no_match: "no action found in the reply",
    illegal: "not a legal action",
    cut_off: "cut off before an action was stated",
  };
  const state = { shown: [], open: -1, episode: null, turn: -1, unfolded: false, pattern: null, search: 0 };

  /** An element; strings among `children` become text. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") element.className = value;
      else element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== ""));
    return element;
  }

  function number(value) {
    if (typeof value !== "number") return value === null ? "" : String(value);
    return Number.isInteger(value) ? String(value) : value.toFixed(2).replace(/^-0\.00$/, "0.00");
  }

  /** The text with what was searched for marked. */
  function marked(text) {
    if (!state.pattern) return [text];
    const nodes = [];
    let end = 0;
    for (const match of text.matchAll(state.pattern)) {
      nodes.push(text.slice(end, match.index), make("mark", {}, match[0]));
      end = match.index + match[0].length;
    }
    return [...nodes, text.slice(end)];
  }

  /** A text, the end of a long one folded away. What was searched for is never hidden. */
  function folded(text) {
    const block = make("div", { class: "text" });
    let cut = text.length > 2 * LONG ? LONG : text.length;
    if (cut < text.length && state.pattern) {
      const last = [...text.matchAll(state.pattern)].pop();
      if (last && last.index + last[0].length > cut) cut = text.length;
    }
    if (cut < text.length && /[\ud800-\udbff]/.test(text[cut - 1])) cut -= 1; // not between the halves of a character
    if (cut === text.length || state.unfolded) {
      block.append(...marked(text));
      return [block];
    }
    block.append(...marked(text.slice(0, cut)), "…");
    const button = make("button", { type: "button", class: "more" }, `Show all ${text.length.toLocaleString("en")} characters`);
    button.addEventListener("click", () => {
      block.replaceChildren(...marked(text));
      button.remove();
    });
    return [block, button];
  }

  const part = (name, label, ...children) =>
    make("div", { class: `part ${name}` }, make("div", { class: "label" }, label), make("div", {}, ...children));

  function drawTurn(turn, position) {
    const got = [];
    if (turn.reward !== null) got.push(`reward ${number(turn.reward)}`);
    if (turn.penalty) got.push(`penalty ${number(turn.penalty)}`);
    if (turn.bonus) got.push(`bonus ${number(turn.bonus)}`);
    if (turn.regret !== undefined) got.push(`regret ${number(turn.regret)}`);
    if (turn.optimal) got.push("optimal");
    const head = make("header", {}, make("h3", {}, `Turn ${position + 1}`));
    if (!turn.valid) head.append(make("span", { class: "badge" }, `⚠ invalid: ${REASONS[turn.reason] || turn.reason}`));
    if (got.length) head.append(make("span", { class: "got muted num" }, got.join(" · ")));
    const card = make("article", { class: turn.valid ? "turn" : "turn invalid", id: `turn-${position}`, tabindex: "-1" }, head);
    if (turn.read) card.append(part("read", "Read", ...folded(turn.read)));
    if (turn.drafts) card.append(part("drafts", "Drafts", ...folded(turn.drafts)));
    if (turn.thought) card.append(part("thought", "Thought", ...folded(turn.thought)));
    const notes = [];
    if (turn.action !== null && turn.action !== turn.said && !turn.said.endsWith(`=${turn.action}`)) {
      notes.push(turn.valid ? `Played: ${turn.action}` : `Played in its place, by chance: ${turn.action}`);
    }
    if (turn.action === null && !turn.valid) notes.push("Nothing was played.");
    if (turn.forced) notes.push("An exploration mechanism wrote this reply, not the model.");
    if (turn.cut_off) notes.push("The reply ran into its token budget.");
    if (turn.legal && turn.legal.length) notes.push(`Legal: ${turn.legal.join(", ")}`);
    const said = turn.said ? folded(turn.said) : [make("em", { class: "muted" }, "nothing")];
    const label = turn.thought || turn.said === turn.action ? "Action" : "Wrote";
    card.append(part("said", label, ...said, ...notes.map((note) => make("p", { class: "note muted" }, ...marked(note)))));
    return card;
  }

  // -- the open episode ------------------------------------------------------------------------------------------

  const later = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && drawMore(), {
    rootMargin: "600px",
  });
  const draw = { turns: [], done: 0, end: null };

  function drawMore(upTo = draw.done + AT_ONCE) {
    for (; draw.done < Math.min(upTo, draw.turns.length); draw.done += 1) {
      const [turn, position] = draw.turns[draw.done];
      draw.end.before(drawTurn(turn, position));
    }
    later.unobserve(draw.end);
    if (draw.done < draw.turns.length) later.observe(draw.end); // anew: it tells again if the end is still in sight
    else draw.end.replaceChildren(...draw.closing());
  }

  function open(position, scroll = true) {
    state.open = position;
    state.turn = -1;
    const holder = get("episode");
    holder.replaceChildren();
    get("empty").hidden = state.shown.length > 0;
    const place = state.shown.indexOf(position);
    get("previous").disabled = place <= 0;
    get("next").disabled = place < 0 || place === state.shown.length - 1;
    if (position < 0) {
      state.episode = null;
      for (const id of ["next-invalid", "unfold"]) get(id).disabled = true;
      return;
    }
    const summary = index.episodes[position];
    const episode = (state.episode = stored(`episode-${position}`));
    const onlyInvalid = get("invalid").checked;
    get("next-invalid").disabled = summary.invalid === 0;
    get("unfold").disabled = false;
    const facts = [
      ["Environment", episode.env],
      ["Seed", episode.seed],
      ["Return", number(episode.return)],
      ["Regret", number(episode.regret)],
      ["Turns", String(summary.turns)],
      ["Invalid", String(summary.invalid)],
      ["Ended by", episode.stop],
      ["Error", episode.error],
    ];
    holder.append(
      make("h2", {}, `Episode ${position + 1}${episode.player ? `: ${episode.player}` : ""}`),
      make(
        "dl",
        { class: "facts num" },
        ...facts.filter((fact) => fact[1]).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))),
      ),
    );
    const instructions = index.instructions[episode.instructions];
    if (instructions) {
      const details = make("details", { class: "instructions" }, make("summary", {}, "Instructions"));
      details.append(make("div", { class: "text" }, ...marked(instructions)));
      details.open = Boolean(details.querySelector("mark"));
      holder.append(details);
    }
    draw.turns = episode.turns.map((turn, at) => [turn, at]).filter(([turn]) => !onlyInvalid || !turn.valid);
    draw.done = 0;
    draw.end = make("div", { class: "end" });
    draw.closing = () => {
      const hidden = episode.turns.length - draw.turns.length;
      const are = hidden === 1 ? "turn is" : "turns are";
      const lines = hidden ? [make("p", {}, `${hidden} valid ${are} hidden by the filter.`)] : [];
      return episode.final ? [...lines, part("read", "At the end", ...folded(episode.final))] : lines;
    };
    holder.append(draw.end);
    drawMore();
    if (scroll) (get("main").scrollTo(0, 0), document.body.classList.contains("reading") && window.scrollTo(0, 0));
    for (const row of get("list").querySelectorAll("[aria-current]")) row.removeAttribute("aria-current");
    const row = get("list").querySelector(`[data-position="${position}"]`);
    if (row) {
      row.setAttribute("aria-current", "true");
      row.scrollIntoView({ block: "nearest" });
    }
    history.replaceState(null, "", `#${position + 1}`);
  }

  function move(step) {
    const place = state.shown.indexOf(state.open) + step;
    if (place < 0 || place >= state.shown.length) return;
    while (rows.done <= place) moreRows();
    open(state.shown[place]);
  }

  function goToTurn(step, wanted = () => true) {
    for (let at = state.turn + step; at >= 0 && at < draw.turns.length; at += step) {
      if (!wanted(draw.turns[at][0])) continue;
      if (at >= draw.done) drawMore(at + AT_ONCE);
      state.turn = at;
      const card = get(`turn-${draw.turns[at][1]}`);
      get("episode").querySelector(".here")?.classList.remove("here");
      card.classList.add("here");
      card.focus({ preventScroll: true });
      card.scrollIntoView({ block: "start" });
      return;
    }
    if (wanted.wraps && state.turn >= 0) {
      state.turn = -1;
      goToTurn(step, wanted);
    }
  }
  const isInvalid = Object.assign((turn) => !turn.valid, { wraps: true });

  function unfold() {
    state.unfolded = !state.unfolded;
    get("unfold").textContent = state.unfolded ? "Fold" : "Unfold all";
    get("unfold").setAttribute("aria-pressed", String(state.unfolded));
    if (state.open >= 0) open(state.open, false);
  }

  // -- the list --------------------------------------------------------------------------------------------------

  const rows = { done: 0 };
  const listEnd = make("li", { "aria-hidden": "true" });
  new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && moreRows(), {
    rootMargin: "400px",
  }).observe(listEnd);

  function row(position) {
    const { player, seed, turns, invalid, stop, regret, ...summary } = index.episodes[position];
    const facts = [`return ${number(summary.return)}`, regret === null ? "" : `regret ${number(regret)}`];
    facts.push(seed && `seed ${seed}`, `${turns} ${turns === 1 ? "turn" : "turns"}`, stop);
    const bad = invalid ? make("span", { class: "bad" }, `⚠ ${invalid} invalid`) : "";
    const button = make("button", { type: "button", "data-position": String(position) });
    button.append(
      make("div", { class: "first" }, make("span", {}, `${position + 1}. ${player || "episode"}`), make("span", {}, bad)),
      make("div", { class: "second num" }, facts.filter(Boolean).join(" · ")),
    );
    if (position === state.open) button.setAttribute("aria-current", "true");
    return make("li", {}, button);
  }

  function moreRows() {
    const next = state.shown.slice(rows.done, rows.done + ROWS);
    listEnd.before(...next.map(row));
    rows.done += next.length;
  }

  function drawList() {
    rows.done = 0;
    get("list").replaceChildren(listEnd);
    moreRows();
  }

  // -- filters and search ----------------------------------------------------------------------------------------

  const passes = (episode) =>
    (!get("player").value || episode.player === get("player").value) &&
    (!get("stop").value || episode.stop === get("stop").value) &&
    (!get("seed").value.trim() || episode.seed === get("seed").value.trim()) &&
    (!get("invalid").checked || episode.invalid > 0);

  function holds(position, pattern) {
    const found = (text) => pattern.test(text);
    const episode = stored(`episode-${position}`);
    const texts = [index.instructions[episode.instructions], episode.final, episode.player, episode.env, episode.error];
    return (
      texts.some(found) ||
      episode.turns.some((turn) => [turn.read, turn.drafts, turn.thought, turn.said, turn.action].some((one) => one && found(one)))
    );
  }

  /** The episodes that pass, in slices of some milliseconds, so that the page answers while it searches. */
  async function apply() {
    const search = (state.search += 1);
    const text = get("search").value;
    const literal = text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
    state.pattern = text ? new RegExp(literal, "giu") : null;
    const candidates = index.episodes.map((_, position) => position).filter((position) => passes(index.episodes[position]));
    let shown = candidates;
    if (state.pattern) {
      const once = new RegExp(literal, "iu"); // a global one would remember where it was
      shown = [];
      let slice = performance.now();
      for (const [done, position] of candidates.entries()) {
        if (performance.now() - slice > 12) {
          get("count").textContent = `Searching: ${Math.round((100 * done) / candidates.length)}%`;
          await new Promise((resolve) => setTimeout(resolve));
          if (search !== state.search) return;
          slice = performance.now();
        }
        if (holds(position, once)) shown.push(position);
      }
    }
    state.shown = shown;
    const all = index.episodes.length;
    get("count").textContent = `${shown.length === all ? "" : `${shown.length} of `}${all} ${all === 1 ? "episode" : "episodes"}`;
    drawList();
    open(shown.includes(state.open) ? state.open : (shown[0] ?? -1));
    document.documentElement.dataset.applied = String(search);
  }

  let waiting = 0;
  get("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(apply, 120);
  });
  get("seed").addEventListener("input", apply);
  for (const id of ["player", "stop", "invalid"]) get(id).addEventListener("change", apply);
  get("filters").addEventListener("submit", (event) => event.preventDefault());

  get("list").addEventListener("click", (event) => {
    const button = event.target.closest("[data-position]");
    if (!button) return;
    document.body.classList.add("reading");
    open(Number(button.dataset.position));
  });
  get("back").addEventListener("click", () => {
    document.body.classList.remove("reading");
    get("list").querySelector("[aria-current]")?.focus();
  });
  get("previous").addEventListener("click", () => move(-1));
  get("next").addEventListener("click", () => move(1));
  get("next-invalid").addEventListener("click", () => goToTurn(1, isInvalid));
  get("unfold").addEventListener("click", unfold);
  get("keys").addEventListener("click", () => get("help").showModal());

  const KEYS = {
    j: () => move(1),
    k: () => move(-1),
    n: () => goToTurn(1),
    p: () => goToTurn(-1),
    i: () => goToTurn(1, isInvalid),
    e: unfold,
    "?": () => get("help").showModal(),
    "/": () => (document.body.classList.remove("reading"), get("search").focus()),
    Escape: () => document.body.classList.remove("reading"),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || get("help").open) return;
    if (event.target.matches("input, select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (!(event.key in KEYS)) return;
    event.preventDefault();
    KEYS[event.key]();
  });

  window.addEventListener("hashchange", () => {
    const position = Number(location.hash.slice(1)) - 1;
    if (position in index.episodes && position !== state.open) open(position);
  });

  // -- start -----------------------------------------------------------------------------------------------------

  document.title = index.title;
  get("title").textContent = index.title;
  for (const name of ["player", "stop"]) {
    const values = [...new Set(index.episodes.map((episode) => episode[name]))].filter(Boolean).sort();
    get(name).append(...values.map((value) => make("option", { value }, value)));
  }
  const wanted = Number(location.hash.slice(1)) - 1;
  if (wanted in index.episodes) {
    state.open = wanted;
    document.body.classList.add("reading");
  }
  apply();
  performance.mark("ready");
})();
