// The page works without this script, but for the list of questions. Every text goes in as text, never as HTML.
"use strict";
const $ = (id) => document.getElementById(id);

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function keep(name, value) {
  try { // a browser may forbid storage for files
    if (value === undefined) return localStorage.getItem(name);
    localStorage.setItem(name, value);
  } catch { /* the choice lasts until the page is closed */ }
  return null;
}

// --- theme, tabs, definitions, copying ---

const THEMES = ["auto", "light", "dark"];
function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
  $("theme").setAttribute("aria-label", "colour theme: " + (theme === "auto" ? "as the system" : theme));
  $("theme").dataset.now = theme;
}
setTheme(THEMES.includes(keep("swift_cl_theme")) ? keep("swift_cl_theme") : "auto");
$("theme").hidden = false;
$("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf($("theme").dataset.now) + 1) % THEMES.length];
  setTheme(next);
  keep("swift_cl_theme", next);
});

function press(group, chosen) {
  for (const button of group.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button === chosen));
}

if ($("tabs")) {
  const sections = [...document.querySelectorAll(".scorer")];
  const show = (name) => { for (const section of sections) section.hidden = section.dataset.scorer !== name; };
  $("tabs").hidden = false;
  show(sections[0].dataset.scorer);
  $("tabs").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) { press($("tabs"), button); show(button.dataset.scorer); }
  });
}

for (const link of document.querySelectorAll(".metrics thead a")) {
  link.addEventListener("click", (event) => {
    event.preventDefault();
    const details = link.closest(".scorer").querySelector(".definitions");
    details.open = true;
    details.querySelector("summary").focus();
    details.scrollIntoView({ block: "nearest" });
  });
}

for (const button of document.querySelectorAll(".copy")) {
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.nextElementSibling.textContent);
    button.textContent = "Copied";
  });
}

// --- questions: [task, id, turn, question, reference, answers[run][row], scores[scorer][run][row]] ---

const [TASK, ID, TURN, QUESTION, REFERENCE, ANSWERS, SCORES] = [0, 1, 2, 3, 4, 5, 6];
const PER_PAGE = 20;
const STATES = {
  all: ["all", ""],
  forgotten: ["forgotten", "right after the stage that learned its task, wrong after the last stage"],
  kept: ["kept", "right after the stage that learned its task and after the last stage"],
  late: ["right later only", "wrong after its own stage, right after some later one"],
  never: ["never learned", "wrong after its own stage and after every later one"],
  unknown: ["not scored", "a score that the other groups need is missing"],
};

function browser(data) {
  const state = { page: 0, status: "all", found: [] };
  const scorers = data.scorers;
  const haystacks = data.questions.map(() => null);

  const text = (position) => data.texts[position];
  const answer = (value) => (value === -1 ? null : value < -1 ? text(-2 - value) : text(value));
  const scorer = () => Number($("scorer").value);
  const own = (question, run) => data.runs[run].own[question[TASK]];
  const isRight = (score, number) => {
    const limit = limits[number];
    return scorers[number].better === "higher" ? score >= limit : score <= limit;
  };
  const limits = scorers.map((entry) => entry.right);

  function haystack(index) {
    if (haystacks[index] === null) {
      const question = data.questions[index];
      const answers = question[ANSWERS].flat().map((value) => answer(value) ?? "");
      const parts = [question[ID], text(question[QUESTION]), text(question[REFERENCE]), ...new Set(answers)];
      haystacks[index] = parts.join("\n").toLowerCase();
    }
    return haystacks[index];
  }

  // What became of a question in one run, by the chosen scorer; `when` is the first row at which it was lost.
  function became(question, run) {
    const learned = own(question, run);
    const scores = question[SCORES][scorer()][run].slice(learned);
    if (!learned || scores.some((score) => score === null)) return { name: "unknown" };
    const right = scores.map((score) => isRight(score, scorer()));
    if (right[0]) {
      if (right[right.length - 1]) return { name: "kept" };
      return { name: "forgotten", when: learned + right.lastIndexOf(true) + 1 };
    }
    return { name: right.includes(true) ? "late" : "never" };
  }

  const chosenRuns = () => ($("run") && $("run").value !== "" ? [Number($("run").value)] : data.runs.map((_, run) => run));

  // How far a score fell since the task's own stage; positive is worse, whatever the scorer's direction.
  function drop(question, run) {
    const scores = question[SCORES][scorer()][run];
    const [first, last] = [scores[own(question, run)], scores[scores.length - 1]];
    if (first === null || last === null || !own(question, run)) return null;
    return scorers[scorer()].better === "higher" ? first - last : last - first;
  }
  function atEnd(question, run) {
    const score = question[SCORES][scorer()][run].at(-1);
    return score === null ? null : scorers[scorer()].better === "higher" ? score : -score;
  }
  function longest(question) {
    return Math.max(...chosenRuns().flatMap((run) => question[ANSWERS][run].map((value) => (answer(value) ?? "").length)));
  }
  function extreme(values, pick) {
    const measured = values.filter((value) => value !== null);
    return measured.length ? pick(...measured) : null;
  }

  const SORTS = {
    drop: (question) => extreme(chosenRuns().map((run) => drop(question, run)), Math.max),
    low: (question) => { const worst = extreme(chosenRuns().map((run) => atEnd(question, run)), Math.min); return worst === null ? null : -worst; },
    high: (question) => extreme(chosenRuns().map((run) => atEnd(question, run)), Math.max),
    long: longest,
  };

  function update(page = 0) {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const task = $("task").value;
    const counts = Object.fromEntries(Object.keys(STATES).map((name) => [name, 0]));
    const found = [];
    data.questions.forEach((question, index) => {
      if (task !== "" && question[TASK] !== Number(task)) return;
      if (words.length && !words.every((word) => haystack(index).includes(word))) return;
      const states = scorers.length ? new Set(chosenRuns().map((run) => became(question, run).name)) : new Set();
      counts.all += 1;
      for (const name of states) counts[name] += 1;
      if (state.status === "all" || states.has(state.status)) found.push(index);
    });
    const key = SORTS[$("sort").value];
    if (key) {
      const keys = new Map(found.map((index) => [index, key(data.questions[index])]));
      found.sort((a, b) => (keys.get(b) ?? -Infinity) - (keys.get(a) ?? -Infinity) || a - b);
    }
    Object.assign(state, { found, page });
    drawStates(counts);
    drawPage();
  }

  function drawStates(counts) {
    if (!scorers.length) return;
    for (const button of $("status").children) {
      const name = button.dataset.status;
      button.textContent = `${STATES[name][0]} ${counts[name]}`;
      button.setAttribute("aria-pressed", String(name === state.status));
      button.hidden = name === "unknown" && !counts.unknown && state.status !== "unknown";
    }
    const { name, better } = scorers[scorer()];
    $("limit-sign").textContent = better === "higher" ? "Right from" : "Right up to";
    const rule = element("dd", "", `${name} of ${limits[scorer()]} or ${better === "higher" ? "more" : "less"}; the limit is yours to choose above`);
    const meanings = Object.entries(STATES).filter(([key]) => key !== "all").flatMap(([, [label, meaning]]) => [element("dt", "", label), element("dd", "", meaning)]);
    if (data.runs.length > 1) meanings.push(element("dt", "", "method: any"), element("dd", "", "a question is in each group that it is in for some method, so the groups can overlap"));
    $("status-meaning").replaceChildren(element("dt", "", "right"), rule, ...meanings);
  }

  function drawPage() {
    const pages = Math.max(1, Math.ceil(state.found.length / PER_PAGE));
    const first = state.page * PER_PAGE;
    $("list").replaceChildren(...state.found.slice(first, first + PER_PAGE).map((index) => card(data.questions[index])));
    $("count").textContent = `${state.found.length} of ${data.questions.length} questions`;
    $("page").textContent = `page ${state.page + 1} of ${pages}`;
    $("previous").disabled = state.page === 0;
    $("next").disabled = state.page >= pages - 1;
    $("pages").hidden = pages === 1;
  }

  function card(question) {
    const details = element("details", "q");
    const summary = element("summary");
    const words = element("div");
    const ask = element("div", "ask", text(question[QUESTION]));
    const reference = element("div", "ref");
    const right = element("bdi", "", text(question[REFERENCE]));
    reference.append(element("span", "tag", "reference "), right);
    ask.dir = "auto";
    const turn = question[TURN] ? `, turn ${question[TURN] + 1}` : "";
    words.append(element("div", "meta", `${data.tasks[question[TASK]]} · ${question[ID]}${turn}`), ask, reference);
    summary.append(words);
    if (scorers.length) {
      const strips = element("div", "strips");
      chosenRuns().forEach((run) => {
        const { name, when } = became(question, run);
        const label = when === undefined ? STATES[name][0] : `forgotten ${data.runs[run].rows[when]}`;
        strips.append(element("span", "", data.runs.length > 1 ? data.runs[run].label : ""), strip(question, run), element("span", "became", label));
      });
      summary.append(strips);
    }
    details.append(summary);
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) details.append(answers(question));
    });
    return details;
  }

  function strip(question, run) {
    const { low, high, better, name } = scorers[scorer()];
    const line = element("span", "strip");
    line.role = "img";
    const said = [];
    question[SCORES][scorer()][run].forEach((score, row) => {
      const square = element("i", (score === null ? "none " : "") + (row && row === own(question, run) ? "own" : ""));
      const shade = score === null ? 0 : Math.min(1, Math.max(0, (score - low) / (high - low)));
      if (score !== null) square.style.setProperty("--v", better === "higher" ? shade : 1 - shade);
      said.push(`${data.runs[run].rows[row]}: ${score ?? "not scored"}`);
      square.title = `${name}, ${said.at(-1)}`;
      line.append(square);
    });
    line.ariaLabel = `${name}; ${said.join("; ")}`;
    return line;
  }

  // A row a model, a column a run; runs with different orders of tasks get a table each.
  function answers(question) {
    const box = element("div", "box");
    const groups = new Map();
    for (const run of chosenRuns()) {
      const key = data.runs[run].rows.join("\n");
      groups.set(key, [...(groups.get(key) ?? []), run]);
    }
    for (const runs of groups.values()) {
      const table = element("table", "answers");
      if (data.runs.length > 1) {
        const head = table.createTHead().insertRow();
        head.append(element("td"), ...runs.map((run) => element("th", "", data.runs[run].label)));
      }
      const body = table.createTBody();
      data.runs[runs[0]].rows.forEach((name, row) => {
        const line = body.insertRow();
        if (row && row === own(question, runs[0])) line.className = "own";
        line.append(element("th", "", name), ...runs.map((run) => answerCell(question, run, row)));
      });
      box.append(table);
    }
    return box;
  }

  function answerCell(question, run, row) {
    const value = question[ANSWERS][run][row];
    const shown = answer(value);
    const cell = element("td");
    const content = value === -1 ? "not asked" : value < -1 ? `failed: ${shown}` : shown === "" ? "empty answer" : shown;
    const box = element("div", "text" + (value < -1 ? " error" : value === -1 || shown === "" ? " empty" : ""), content);
    box.dir = "auto";
    const scores = element("div", "scores");
    scorers.forEach((entry, number) => {
      const score = question[SCORES][number][run][row];
      if (score !== null) scores.append(element("span", isRight(score, number) ? "right" : "", `${entry.name} ${score}`));
    });
    cell.append(box, scores);
    return cell;
  }

  function download() {
    const quote = (value) => `"${String(value).replaceAll('"', '""')}"`;
    const names = scorers.map((entry) => entry.name);
    const lines = [["task", "id", "turn", "run", "model", "question", "reference", "answer", "error", ...names]];
    for (const index of state.found) {
      const question = data.questions[index];
      for (const run of chosenRuns()) {
        data.runs[run].rows.forEach((name, row) => {
          const value = question[ANSWERS][run][row];
          const shown = answer(value) ?? "";
          const scores = scorers.map((_, number) => question[SCORES][number][run][row] ?? "");
          const texts = [text(question[QUESTION]), text(question[REFERENCE]), value < -1 ? "" : shown, value < -1 ? shown : ""];
          lines.push([data.tasks[question[TASK]], question[ID], question[TURN], data.runs[run].label, name, ...texts, ...scores]);
        });
      }
    }
    const blob = new Blob(["\ufeff", lines.map((line) => line.map(quote).join(",")).join("\n"), "\n"], { type: "text/csv" });
    const link = element("a");
    link.href = URL.createObjectURL(blob);
    link.download = "questions.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  if (scorers.length) {
    for (const name of Object.keys(STATES)) {
      const button = element("button");
      button.type = "button";
      button.dataset.status = name;
      button.title = STATES[name][1];
      $("status").append(button);
    }
    $("status").addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) { state.status = button.dataset.status; update(); }
    });
    $("limit").value = limits[0];
    $("limit").addEventListener("input", () => {
      if ($("limit").value !== "" && Number.isFinite($("limit").valueAsNumber)) { limits[scorer()] = $("limit").valueAsNumber; update(); }
    });
    $("scorer").addEventListener("change", () => { $("limit").value = limits[scorer()]; });
  }
  let waiting;
  $("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(update, 120); });
  $("filters").addEventListener("change", (event) => { if (event.target.tagName === "SELECT") update(); });
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("download").addEventListener("click", download);
  const turn = (step) => { state.page += step; drawPage(); $("browser").scrollIntoView(); $("list").querySelector("summary")?.focus({ preventScroll: true }); };
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  $("browser").hidden = false;
  update();
}

if ($("data")) browser(JSON.parse($("data").textContent));
