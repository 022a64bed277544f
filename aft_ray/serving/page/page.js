// The web page of the reasoner: sends a question, shows the candidates as they arrive, and then their ranking.
//
// Invariants: text from the server and from the user is inserted as text, never as markup; nothing is requested from
// another origin; the API key is kept only until the tab is closed.

const STRATEGIES = {
  greedy: ["Greedy", "One candidate, which has the most probable token at every step."],
  score: ["Best score", "The candidate that the model itself scores highest."],
  vote: ["Vote", "The answer that most candidates give; a tie goes to the higher scores."],
  weighted_vote: ["Weighted vote", "The answer with the most votes, each weighted by its candidate's exp(score)."],
};
const STOPPED = {
  certain: " Stopped early: nothing could change the answer any more.",
  confident: " Stopped early: the confidence was high enough.",
  deadline: " Stopped at the deadline.",
};
const SAMPLING = ["n", "temperature", "stop_confidence"]; // settings that the greedy strategy does not use

const $ = (id) => document.getElementById(id);
let model = null; // the served model as GET v1/models describes it; null until the server has answered
let running = null; // the AbortController of the request in progress
let shown = null; // the {request, result} that the page shows
let history = []; // the {request, result} of earlier questions, newest first

class Failure extends Error {
  constructor(message, about = {}) {
    super(message);
    Object.assign(this, { status: 0, param: null, wait: 0, ...about });
  }
}

function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const counted = (count, thing) => `${count} ${thing}${count === 1 ? "" : "s"}`;
const time = (s) => `${s.toFixed(2)} s`;
const percent = (share) => `${share < 1 ? Math.min(99, Math.round(100 * share)) : 100} %`; // 100 % only for all
const sampledOf = ({ sampled, asked }) => `${sampled} of ${counted(asked, "candidate")}.`;
const strategyName = (strategy) => STRATEGIES[strategy]?.[0] ?? strategy;
const versionText = (version) => (version === null ? "not from a run" : `version ${version}`);

// ---- The server

async function call(path, options = {}) {
  const key = $("key").value.trim();
  // With such a key, fetch would fail as if the server could not be reached.
  if (/[^!-~]/.test(key)) throw new Failure("No API key has such a character.", { status: 401, param: "key" });
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers, cache: "no-store" }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached. It may have stopped, or the network is down.");
  });
  if (response.ok) return response;
  const { status } = response;
  const error = (await response.json().catch(() => null))?.error;
  const message = error?.message ?? `The server answered with status ${status} and did not say why.`;
  const wait = Number(response.headers.get("Retry-After")) || 0;
  throw new Failure(message, { status, wait, param: status === 401 ? "key" : error?.param });
}

/** Yields the server-sent events of a byte stream as {type, data}. Its chunks may end anywhere, also in a character. */
export async function* readEvents(bytes) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let [rest, type, data] = ["", "", []];
  for (let done = false; !done; ) {
    let chunk;
    try {
      ({ value: chunk = "", done } = await reader.read());
    } catch {
      throw new Failure("The connection broke off before the result.");
    }
    // A CR at the end of a chunk may be half of a CRLF: the line is completed with the next chunk.
    const lines = (rest + chunk).split(done ? /\r\n|\n|\r/ : /\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line);
      if (field === "event") type = value;
      else if (field === "data") data.push(value);
      if (line !== "") continue;
      if (data.length) yield { type, data: data.join("\n") };
      [type, data] = ["", []];
    }
  }
}

// ---- The form

async function loadModel() {
  try {
    const { data } = await (await call("v1/models")).json();
    model = data[0];
    $("model").textContent = model.id;
    $("version").textContent = versionText(model.version);
    const tasks = Object.keys(model.tasks);
    $("strategy").replaceChildren(...model.strategies.map((name) => new Option(strategyName(name), name)));
    $("task").replaceChildren(...tasks.map((name) => new Option(name, name)));
    $("task-row").hidden = tasks.length < 2;
    $("n").max = model.limits.n;
    for (const name of ["strategy", ...SAMPLING]) $(name).value = model.defaults[name] ?? $(name).value;
    showExamples();
    showSettings();
    clearError();
  } catch (error) {
    fail(error, loadModel);
  }
}

function showExamples() {
  const examples = model.tasks[$("task").value]?.examples ?? [];
  const choose = (value) => Object.assign($("question"), { value }).focus();
  const button = (text) => make("button", { type: "button", className: "quiet", onclick: () => choose(text) }, text);
  $("examples").hidden = examples.length === 0;
  $("examples").replaceChildren(...examples.slice(0, 4).map(button));
}

function showSettings() {
  const strategy = $("strategy").value;
  const stop = Number($("stop_confidence").value);
  for (const name of SAMPLING) $(name).disabled = strategy === "greedy";
  $("strategy-hint").textContent = STRATEGIES[strategy]?.[1] ?? "";
  $("stop-hint").textContent = stop < 1 ? `At ${percent(stop)} confidence.` : "When nothing can change the answer.";
  $("stop_confidence").setAttribute("aria-valuetext", $("stop-hint").textContent);
  const numbers = strategy === "greedy" ? "" : `, ${$("n").value} candidates, temperature ${$("temperature").value}`;
  $("brief").textContent = strategyName(strategy) + numbers;
}

/** Returns the request that the form describes. The server has defaults for fields that are empty. */
function requestFromForm() {
  const request = { question: $("question").value.trim() };
  if (!$("task-row").hidden) request.task = $("task").value;
  if ($("strategy").value) request.strategy = $("strategy").value;
  for (const name of [...SAMPLING, "seed"]) {
    if (!$(name).disabled && $(name).value !== "") request[name] = Number($(name).value);
  }
  return request;
}

function submit(event) {
  event.preventDefault();
  if (running) return;
  clearError();
  const request = requestFromForm();
  // A number that is no multiple of its step is valid, since steps are for the arrow keys only.
  const invalid = ({ badInput, rangeUnderflow, rangeOverflow }) => badInput || rangeUnderflow || rangeOverflow;
  const wrong = [...event.target.elements].find((field) => field.willValidate && invalid(field.validity));
  const reject = (message, param) => fail(new Failure(message, { status: 400, param }));
  if (wrong) reject(`${wrong.labels[0].textContent}: ${wrong.validationMessage}`, wrong.id);
  else if (request.question) ask(request);
  else if (model) reject("Type a question first.", "question");
  else loadModel(); // without a model, the user has entered the key
}

// ---- A request and its stream

async function ask(request) {
  const { signal } = (running = new AbortController());
  const [method, headers] = ["POST", { "Content-Type": "application/json" }];
  clearError();
  busy(true);
  try {
    const body = JSON.stringify({ ...request, stream: true });
    const response = await call("v1/reason", { method, headers, body, signal });
    if (!model) loadModel(); // it was rejected before for want of this key
    const result = await showStream(response.body);
    history = [{ request, result }, ...history].slice(0, 20);
    show(history[0]);
    $("version").textContent = versionText(result.version);
    say(`Answer: ${result.answer ?? "none"}. ${sampledOf(result.sampling)}`);
  } catch (error) {
    const count = $("candidates").childElementCount;
    const left = count ? `${counted(count, "candidate")} came, not ranked.` : "";
    say(signal.aborted ? `Stopped. ${left}` : left);
    if (!signal.aborted) fail(error, () => ask(request));
  } finally {
    busy(false);
  }
}

/** Shows the candidates of a stream as they arrive; returns the result at its end. */
async function showStream(bytes) {
  for await (const { type, data } of readEvents(bytes)) {
    const content = JSON.parse(data);
    if (type === "error") throw new Failure(content.error.message);
    if (type === "result") return content;
    if (type === "start") $("progress").max = content.n;
    if (type === "candidate") {
      $("candidates").append(candidateItem(content));
      $("list").hidden = false;
      $("progress").value = $("candidates").childElementCount;
      // At most one a second, since a screen reader reads each of them aloud.
      say(`${$("progress").value} of ${counted($("progress").max, "candidate")}`, 1000);
    }
  }
  throw new Failure("The connection ended before the result.");
}

function busy(on) {
  if (!on && document.activeElement === $("stop")) $("ask").focus();
  $("ask").setAttribute("aria-disabled", on); // a disabled button would lose the keyboard focus
  $("stop").hidden = $("progress").hidden = !on;
  $("earlier").inert = on;
  running = on ? running : null;
  if (!on) return;
  $("result").hidden = $("list").hidden = true;
  $("candidates").replaceChildren();
  $("list-heading").textContent = "Candidates in order of arrival";
  $("progress").removeAttribute("value");
  $("progress").scrollIntoView({ block: "nearest" });
  say("Waiting for the first candidate …");
}

// ---- The result

function show(entry) {
  const { request, result } = (shown = entry);
  $("asked").textContent = request.question;
  $("answer").textContent = result.answer ?? "No answer";
  $("copy-answer").disabled = result.answer === null;
  $("confidence").textContent = percent(result.confidence);
  $("explanation").textContent = result.explanation;
  $("list-heading").textContent = "Candidates, best first";
  $("result").hidden = $("list").hidden = $("earlier").hidden = false;
  showVotes(result);
  showFacts(result);
  showRanking(result.candidates);
  $("history").replaceChildren(...history.map(historyItem));
}

function showFacts({ strategy, version, sampling, timings, usage, seed }) {
  const saved = sampling.tokens_saved ? ` ${counted(sampling.tokens_saved, "token")} saved.` : "";
  const facts = {
    Strategy: strategyName(strategy),
    Policy: versionText(version),
    Sampled: sampledOf(sampling) + (STOPPED[sampling.stopped] ?? "") + saved,
    Time: `${time(timings.total_s)}: ${time(timings.queued_s)} queued, ${time(timings.sampling_s)} sampling`,
    Tokens: `${usage.completion_tokens} sampled, ${usage.prompt_tokens} in the prompt`,
    Seed: String(seed),
  };
  $("facts").replaceChildren(...Object.entries(facts).flatMap(([k, v]) => [make("dt", {}, k), make("dd", {}, v)]));
}

function showVotes({ candidates, strategy }) {
  const weighted = strategy === "weighted_vote";
  const size = (group) => group.reduce((sum, c) => sum + (weighted ? c.weight : 1), 0);
  // Equal answers have equal keys, however they are spelled.
  const byAnswer = Map.groupBy(candidates.filter((c) => c.key !== null), (c) => c.key);
  const answers = [...byAnswer.values()].sort((a, b) => size(b) - size(a));
  const total = size(answers.flat());
  const rows = answers.map((group) => {
    const share = size(group) / total;
    const figures = make("span", { className: "share" }, `${counted(group.length, "vote")}, ${percent(share)}`);
    const className = group.some((c) => c.rank === 1) ? "leading" : "";
    return make("li", { className }, make("bdi", {}, group[0].answer), bar(share), figures);
  });
  const silent = candidates.length - answers.flat().length;
  if (silent) rows.push(make("li", { className: "silent" }, `${counted(silent, "candidate")} without an answer`));
  $("votes-heading").textContent = weighted ? "Votes, weighted by exp(score)" : "Votes";
  $("votes").replaceChildren(...rows);
}

/** Returns a bar that fills `share` of its width, hidden from screen readers since the number stands beside it. */
function bar(share) {
  const fill = make("span", {});
  fill.style.width = `${100 * share}%`;
  return make("span", { className: "bar", ariaHidden: "true" }, fill);
}

function candidateItem({ index, answer, response, score, tokens, finish_reason }) {
  const answerText = make("bdi", { className: answer === null ? "none" : "" }, answer ?? "No answer");
  const given = make("span", { className: "given" }, answerText);
  if (finish_reason === "length") given.append(make("span", { className: "badge cut" }, "cut off"));
  const title = "Mean log-probability of the response's tokens, in nats. The bar is exp(score).";
  const scored = make("span", { className: "score", title }, `score ${score.toFixed(3)}`, bar(Math.exp(score)));
  const figures = make("span", { className: "figures" }, make("span", { className: "count" }), scored);
  figures.append(make("span", { className: "tokens" }, counted(tokens, "token")));
  const summary = make("summary", {}, make("span", { className: "rank" }), given, figures);
  const text = make("p", { className: "response", dir: "auto" }, response);
  const item = make("li", {}, make("details", {}, summary, text));
  item.dataset.index = index;
  return item;
}

/** Puts the candidates in the order of their ranks; those that are on the page move there with an animation. */
function showRanking(candidates) {
  const now = [...$("candidates").children];
  const places = new Map(now.map((item) => [item.dataset.index, { item, top: item.offsetTop }]));
  const items = candidates.map((candidate) => {
    const item = places.get(String(candidate.index))?.item ?? candidateItem(candidate);
    item.querySelector(".rank").textContent = candidate.rank;
    item.querySelector(".count").textContent = counted(candidate.votes, "vote");
    if (candidate.rank > 1) return item;
    item.className = "winner";
    item.querySelector(".given").append(make("span", { className: "badge" }, "Winner"));
    item.querySelector("details").open = true;
    return item;
  });
  const focused = document.activeElement;
  $("candidates").replaceChildren(...items);
  focused.focus({ preventScroll: true }); // an element that is moved loses the focus
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  for (const item of items) {
    const shift = (places.get(item.dataset.index)?.top ?? item.offsetTop) - item.offsetTop;
    if (shift) item.animate({ transform: [`translateY(${shift}px)`, "none"] }, { duration: 350, easing: "ease-out" });
  }
}

function historyItem(entry) {
  const { request, result } = entry;
  const onclick = () => {
    clearError();
    say("");
    $("candidates").replaceChildren();
    show(entry);
    $("result-heading").focus();
  };
  const button = make("button", { type: "button", className: "quiet", ariaCurrent: String(entry === shown), onclick });
  button.append(make("bdi", {}, request.question));
  button.append(make("bdi", { className: "outcome" }, result.answer ?? "no answer"));
  return make("li", {}, button);
}

// ---- Status and errors

let [statusTimer, statusAt, retryTimer] = [0, 0, 0];

/** Shows a status text, which screen readers read aloud, at least `apart` milliseconds after the last one. */
function say(text, apart = 0) {
  clearTimeout(statusTimer);
  const put = () => {
    statusAt = Date.now();
    $("status").textContent = text;
  };
  statusTimer = setTimeout(put, Math.max(0, statusAt + apart - Date.now()));
}

/** Shows an error and marks the field that it names. A button calls `again` if trying again may help. */
function fail(error, again) {
  const known = error instanceof Failure;
  if (!known) console.error(error); // for those who debug the server
  $("error").textContent = known ? error.message : "This page does not understand the server's answer.";
  if (error.status === 401) $("key-row").hidden = false;
  const field = error.param && $("form").elements.namedItem(error.param);
  if (field) {
    if ($("settings").contains(field)) $("settings").open = true;
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-errormessage", "error");
    field.focus();
  }
  if (again && (!error.status || error.status >= 429)) offerRetry(again, Date.now() + 1000 * (error.wait ?? 0));
}

function offerRetry(again, due) {
  const left = Math.ceil((due - Date.now()) / 1000);
  Object.assign($("retry"), { hidden: false, disabled: left > 0, onclick: again });
  $("retry").textContent = left > 0 ? `Try again in ${left} s` : "Try again";
  if (left > 0) retryTimer = setTimeout(offerRetry, 250, again, due);
}

function clearError() {
  clearTimeout(retryTimer);
  if (document.activeElement === $("retry")) $("ask").focus();
  $("retry").hidden = true;
  $("error").textContent = "";
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

// ---- Copying, colours and browser storage

/** Returns an equivalent curl command with the seed of the answer. It names a variable instead of the API key. */
function curl({ request, result }) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const key = $("key").value ? ` -H "Authorization: Bearer $API_KEY"` : "";
  const body = JSON.stringify({ ...request, seed: result.seed });
  const url = new URL("v1/reason", location).href;
  return `curl ${quoted(url)}${key} -H 'Content-Type: application/json' -d ${quoted(body)}`;
}

/** Copies with execCommand: a page from another machine over plain HTTP has no access to the clipboard object. */
function copy(button, text) {
  const area = make("textarea", { value: text });
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  button.focus();
  say(copied ? "Copied." : "The browser does not let this page copy.");
  button.classList.toggle("copied", copied);
  setTimeout(() => button.classList.remove("copied"), 1500);
}

/** Returns a stored value, after storing `value` if it is given. Storage that is switched off throws. */
function stored(area, name, value) {
  try {
    if (value !== undefined) window[area].setItem(name, value);
    return window[area].getItem(name) ?? "";
  } catch {
    return value ?? "";
  }
}

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
function showTheme(chosen = stored("localStorage", "theme")) {
  const other = (chosen || (prefersDark.matches ? "dark" : "light")) === "dark" ? "Light" : "Dark";
  if (chosen) document.documentElement.dataset.theme = chosen;
  $("theme").textContent = other;
  $("theme").ariaLabel = `${other} colours`;
  $("theme").onclick = () => showTheme(stored("localStorage", "theme", other.toLowerCase()));
}

/** Takes the question from #q=…. A plus sign in it is a plus sign, not a space as in a form's query. */
function prefill() {
  const question = new URLSearchParams(location.hash.slice(1).replace(/[+&]/g, encodeURIComponent)).get("q");
  if (question !== null) $("question").value = question;
}

$("form").addEventListener("submit", submit);
$("settings").addEventListener("input", () => model && showSettings());
$("task").addEventListener("change", showExamples);
$("stop").addEventListener("click", () => running?.abort());
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("key").addEventListener("change", () => stored("sessionStorage", "api-key", $("key").value.trim()));
$("copy-answer").addEventListener("click", (event) => copy(event.currentTarget, shown.result.answer));
$("copy-curl").addEventListener("click", (event) => copy(event.currentTarget, curl(shown)));
prefersDark.addEventListener("change", () => showTheme());
window.addEventListener("hashchange", prefill);

$("key").value = stored("sessionStorage", "api-key");
$("key-row").hidden = !$("key").value;
showTheme();
prefill();
loadModel();
