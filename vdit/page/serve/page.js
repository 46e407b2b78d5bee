// The page of `vdit serve`: it fills in a request, follows it, and shows results. No dependencies.
"use strict";

const model = JSON.parse(document.body.dataset.model);
const form = document.getElementById("ask");
const $ = (id) => document.getElementById(id);
const SHOTS = ["--s0", "--s1", "--s2", "--s3"];
const PAGE = 24; // results that are shown at a time
const PERIOD = 250; // milliseconds between looks at a request
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;

/** An element with properties and children. */
function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** JSON of an address; throws the list of errors that it answers. */
async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", ...options });
  } catch {
    throw [{ field: "", message: "the server does not answer" }];
  }
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    throw Object.assign(found.errors ?? [{ field: "", message: answer.statusText }],
      { status: answer.status });
  }
  return found;
}

const asJSON = (body) => ({
  method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
});

// ------------------------------------------------------------------------------------------------
// Errors, each beside its field

function clearErrors() {
  for (const place of document.querySelectorAll("[data-error]")) place.hidden = true;
  for (const field of form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

function showErrors(errors) {
  if (!Array.isArray(errors)) throw errors;
  for (const { field, message } of errors) {
    const name = field.split(".")[0];
    const place = $(`error-${name}`) ?? $(name === "file" ? "error-given" : "error-other");
    place.textContent = place.hidden ? message : `${place.textContent}; ${message}`;
    place.hidden = false;
    $(name)?.setAttribute("aria-invalid", "true");
  }
  document.querySelector("[aria-invalid]")?.focus();
}

// ------------------------------------------------------------------------------------------------
// The timeline: given frames and shots

let given = []; // {upload | result, at, last, name, picture, seconds}
let shots = []; // {start, caption}

const fps = () => model.fps;
const inNumber = (id) => ($(id) && $(id).value.trim() !== "" ? Number($(id).value) : null);

/** The clip's frames: 1 + k patches, at least as long as asked for. */
function frames() {
  const seconds = inNumber("seconds") ?? model.seconds;
  const blocks = Math.ceil(Math.max(seconds * fps() - 1, 0) / model.patch - 1e-6);
  return 1 + blocks * model.patch;
}

const length = () => Math.max(frames() / fps(), 1 / fps());
const onFrame = (seconds) =>
  Math.min(Math.max(Math.round(seconds * fps()), 0), frames() - 1) / fps();
const shown = (seconds) => String(Math.round(seconds * 1000) / 1000);

function place(part, seconds) {
  part.at = model.given === "any" ? onFrame(seconds) : 0;
}

function drawRuler() {
  const ruler = $("ruler"), total = length();
  const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300].find((s) => total / s <= 8) ?? 600;
  ruler.replaceChildren();
  for (let k = 0; k * step < total - step * 0.4; k++) {
    ruler.append(element("span", { textContent: shown(k * step) }));
    ruler.lastChild.style.left = `${(100 * k * step) / total}%`;
  }
  ruler.append(element("span", { className: "last", textContent: `${shown(total)} s` }));
  ruler.lastChild.style.left = "100%";
}

/** Where a mark begins, which is never behind the end. */
const leftOf = (part) => `min(${(100 * part.at) / length()}%, 100% - 2.6rem)`;

function mark(part) {
  const node = element("button", { type: "button", className: "mark" });
  const total = length();
  node.setAttribute("aria-label", `${part.name}, at ${shown(part.at)} seconds; arrow keys move it`);
  node.title = `${part.name}: at ${shown(part.at)} s`;
  node.style.left = leftOf(part);
  const width = Math.max(part.seconds || 0, 1 / fps());
  node.style.width = `${(100 * Math.min(width, total - part.at)) / total}%`;
  if (part.picture) node.style.backgroundImage = `url("${part.picture}")`;
  node.addEventListener("pointerdown", (event) => drag(event, part, node));
  node.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Delete") given = given.filter((other) => other !== part);
    else if (by) place(part, part.at + by / fps());
    else return;
    event.preventDefault();
    const at = given.indexOf(part);
    drawTimeline();
    $("marks").children[at]?.focus();
  });
  return node;
}

function drag(event, part, node) {
  const width = $("track").clientWidth, from = event.clientX, at = part.at;
  node.setPointerCapture(event.pointerId);
  const move = (now) => {
    place(part, at + ((now.clientX - from) / width) * length());
    node.style.left = leftOf(part);
  };
  node.addEventListener("pointermove", move);
  node.addEventListener("pointerup", () => drawTimeline(), { once: true });
}

function row(picture, middle, seconds, change, remove) {
  const time = element("input", { type: "number", value: shown(seconds), step: "any", min: "0" });
  time.setAttribute("aria-label", "seconds");
  time.addEventListener("change", () => {
    time.value = shown(change(Number(time.value)));
    drawTrack();
  });
  const away = element("button", { type: "button", className: "quiet", textContent: "Remove" });
  away.addEventListener("click", remove);
  return element("li", {}, picture, middle, element("span", { className: "at" }, time, "s"), away);
}

function givenRow(part) {
  const picture = part.picture ? element("img", { src: part.picture, alt: "" })
    : element("span", { className: "swatch" });
  const name = element("span", { className: "name", textContent: part.name, title: part.name });
  return row(picture, name, part.at,
    (seconds) => { place(part, seconds); return part.at; },
    () => { given = given.filter((other) => other !== part); drawTimeline(); });
}

function shotRow(shot, number) {
  const swatch = element("span", { className: "swatch", textContent: String(number + 1) });
  swatch.style.setProperty("--band", `var(${SHOTS[number % SHOTS.length]})`);
  const caption = element("input", { value: shot.caption, placeholder: "what this shot shows" });
  caption.setAttribute("aria-label", `caption of shot ${number + 1}`);
  caption.addEventListener("input", () => { shot.caption = caption.value; drawBands(); });
  return row(swatch, caption, shot.start,
    (seconds) => { shot.start = seconds; return seconds; },
    () => { shots = shots.filter((other) => other !== shot); drawTimeline(); });
}

function drawBands() {
  const total = length();
  $("bands").replaceChildren(...shots.map((shot, number) => {
    const end = shots[number + 1]?.start ?? total;
    const band = element("div", { textContent: `${number + 1} ${shot.caption}` });
    band.style.left = `${(100 * shot.start) / total}%`;
    band.style.width = `${(100 * Math.max(Math.min(end, total) - shot.start, 0)) / total}%`;
    band.style.setProperty("--band", `var(${SHOTS[number % SHOTS.length]})`);
    return band;
  }));
}

/** All but the rows, in which somebody may be writing. */
function drawTrack() {
  if ($("hint-seconds")) {
    $("hint-seconds").textContent = `${frames()} frames, ${shown(length())} s`;
  }
  if (!$("track")) return;
  drawRuler();
  drawBands();
  $("marks").replaceChildren(...given.map(mark));
  $("empty").hidden = given.length + shots.length > 0;
}

function drawTimeline() {
  drawTrack();
  $("rows")?.replaceChildren(...given.map(givenRow), ...shots.map(shotRow));
}

async function addFiles(files, seconds) {
  clearErrors();
  for (const file of files) {
    const body = new FormData();
    body.append("file", file);
    try {
      const known = await ask("api/uploads", { method: "POST", body });
      const part = { upload: known.id, name: known.name, last: 0, seconds: known.seconds,
        picture: `api/uploads/${known.id}/picture` };
      place(part, seconds);
      given.push(part);
    } catch (errors) {
      showErrors(errors);
    }
  }
  drawTimeline();
}

function listenToTimeline() {
  const track = $("track");
  if (track && $("pick")) {
    $("pick").addEventListener("click", () => $("file").click());
    $("file").addEventListener("change", () => {
      addFiles([...$("file").files], 0).then(() => { $("file").value = ""; });
    });
    for (const kind of ["dragenter", "dragover"]) {
      track.addEventListener(kind, (event) => {
        event.preventDefault();
        track.classList.add("over");
      });
    }
    track.addEventListener("dragleave", () => track.classList.remove("over"));
    track.addEventListener("drop", (event) => {
      event.preventDefault();
      track.classList.remove("over");
      const box = track.getBoundingClientRect();
      const seconds = ((event.clientX - box.left) / box.width) * length();
      addFiles([...event.dataTransfer.files], seconds);
    });
    for (const kind of ["dragover", "drop"]) { // a file beside the timeline opens no other page
      document.addEventListener(kind, (event) => event.preventDefault());
    }
  }
  $("shot")?.addEventListener("click", () => {
    const last = shots.at(-1)?.start ?? 0;
    shots.push({ start: shots.length ? onFrame((last + length()) / 2) : 0, caption: "" });
    drawTimeline();
    $("rows").lastChild.querySelector("input").focus();
  });
  $("seconds").addEventListener("input", drawTrack);
}

// ------------------------------------------------------------------------------------------------
// Requests

/** The fields that differ from the model's own, which the server fills in. */
function request() {
  const boxes = [...form.querySelectorAll("[name=lora]")];
  return {
    prompt: $("prompt").value,
    negative: $("negative")?.value.trim() || null,
    seconds: inNumber("seconds"), size: $("size").value.trim() || null,
    num: inNumber("num") ?? 1, seed: inNumber("seed") ?? 0,
    steps: inNumber("steps"), guidance: inNumber("guidance"),
    shots: shots.map(({ start, caption }) => ({ start, caption })),
    given: given.map(({ upload = "", result = "", at, last = 0 }) => ({ upload, result, at, last })),
    lora: boxes.length ? boxes.filter((box) => box.checked).map((box) => box.value) : null,
  };
}

async function generate() {
  clearErrors();
  $("go").disabled = true;
  try {
    const asked = request();
    const state = await ask("api/jobs", asJSON(asked));
    remember([...remembered(), { id: state.id, prompt: asked.prompt }]);
    follow(state.id, asked.prompt, state);
  } catch (errors) {
    showErrors(errors);
  } finally {
    $("go").disabled = false;
  }
}

const remembered = () => JSON.parse(sessionStorage.getItem("jobs") ?? "[]");
const remember = (jobs) => sessionStorage.setItem("jobs", JSON.stringify(jobs));
const forget = (id) => remember(remembered().filter((job) => job.id !== id));

function clock(seconds) {
  if (seconds === null) return "";
  const whole = Math.ceil(seconds);
  return `, ${whole >= 60 ? `${Math.floor(whole / 60)} min ${whole % 60}` : whole} s left`;
}

function said(state) {
  if (state.error) return state.error;
  if (state.state === "waiting") {
    return state.place === 1 ? "1 request before this one" : state.place === 0 ? "the server is getting ready"
      : `${state.place} requests before this one`;
  }
  if (state.step === 0) return "preparing; a new length or task is compiled first";
  return `step ${state.step} of ${state.steps}${clock(state.seconds_left)}`;
}

/** Shows a request until it is over. */
async function follow(id, prompt, state = null) {
  const picture = element("div", { className: "picture" });
  const bar = element("progress", { value: 0, max: 1 });
  const line = element("p", { className: "said" });
  const button = element("button", { type: "button", textContent: "Cancel" });
  const card = element("article", { className: "job" }, picture,
    element("p", { textContent: prompt || "without words" }), button, bar, line);
  button.addEventListener("click", () => {
    button.disabled = true;
    ask(`api/jobs/${id}`, { method: "DELETE" }).catch(() => {});
  });
  $("jobs").append(card);
  let seen = 0, done = 0;
  for (;;) {
    try {
      state = state ?? await ask(`api/jobs/${id}`);
    } catch (errors) {
      if (errors.status === 404 || errors.status === 401) break;
      line.textContent = errors[0]?.message ?? "";
      await new Promise((resolve) => setTimeout(resolve, 2000));
      continue;
    }
    bar.max = state.steps;
    bar.value = state.step;
    line.textContent = said(state);
    if (state.previews > seen) {
      seen = state.previews;
      const image = picture.firstChild ?? element("img", { alt: "preview" });
      image.src = `api/jobs/${id}/preview?${seen}`;
      if (!picture.firstChild) picture.append(image);
    }
    for (; done < state.results.length; done++) await addResult(state.results[done]);
    if (state.state === "failed") return fail(card, button, bar, id);
    if (state.state === "done" || state.state === "cancelled") break;
    state = null;
    await new Promise((resolve) => setTimeout(resolve, PERIOD));
  }
  forget(id);
  card.remove();
}

function fail(card, button, bar, id) {
  forget(id);
  card.classList.add("failed");
  bar.remove();
  const away = element("button", { type: "button", textContent: "Dismiss" });
  away.addEventListener("click", () => card.remove());
  button.replaceWith(away);
}

// ------------------------------------------------------------------------------------------------
// Results

async function addResult(id) {
  try {
    $("wall").prepend(card(await ask(`api/results/${id}`)));
    $("none").hidden = true;
  } catch (errors) {
    showErrors(errors);
  }
}

let oldest = "";

async function older() {
  const found = await ask(`api/results?most=${PAGE}&before=${oldest}`).catch(() => []);
  $("wall").append(...found.map(card));
  oldest = found.at(-1)?.id ?? oldest;
  $("older").hidden = found.length < PAGE;
  $("none").hidden = $("wall").children.length > 0;
}

function moving(result) {
  const { id, settings, files } = result;
  if (settings.frames === 1 && files.includes("png")) {
    return element("img", { src: `results/${id}.png`, alt: settings.prompt, loading: "lazy" });
  }
  const video = element("video", { src: `results/${id}.mp4`, loop: true, muted: true,
    playsInline: true, autoplay: !still, preload: "metadata" });
  video.style.aspectRatio = `${settings.size[1]} / ${settings.size[0]}`;
  video.setAttribute("aria-label", settings.prompt);
  video.tabIndex = 0;
  const turn = () => (video.paused ? video.play() : video.pause());
  video.addEventListener("click", turn);
  video.addEventListener("keydown", (event) => {
    if (event.key === " ") { event.preventDefault(); turn(); }
  });
  return video;
}

function card(result) {
  const { id, settings, files } = result;
  const seconds = shown(settings.frames / settings.fps);
  const meta = [`seed ${settings.seed}`, `${seconds} s`, `${settings.size[0]}×${settings.size[1]}`,
    `${settings.steps} steps`, `guidance ${settings.guidance}`];
  const links = element("div", { className: "links" });
  for (const [kind, name] of [["mp4", "MP4"], ["gif", "GIF"], ["json", "Settings"]]) {
    if (files.includes(kind)) {
      links.append(element("a", { href: `results/${id}.${kind}?download=true`, textContent: name,
        download: "" }));
    }
  }
  const action = (text, act) => {
    const button = element("button", { type: "button", textContent: text });
    button.addEventListener("click", () => { act(result); });
    links.append(button);
  };
  if (model.given === "any" || model.given === "start") action("Go on from the last frames", goOn);
  action("Same seed, other words", again);
  return element("article", { className: "result" }, moving(result),
    element("h2", { textContent: settings.prompt || "without words", title: settings.prompt }),
    element("p", { className: "meta", textContent: meta.join(", ") }), reading(settings), links,
    details(settings));
}

function reading(settings) {
  if (!settings.reading) return null;
  const lines = settings.reading.map((line) => element("li", { textContent: line }));
  const title = "It knows the renderer of the world, not the model or the prompt";
  lines.unshift(element("li", { title }, element("b", { textContent: "The oracle reads" })));
  return element("ul", { className: "reading" }, ...lines);
}

function details(settings) {
  const list = element("dl");
  for (const [name, value] of Object.entries(settings)) {
    if (name === "prompt" || name === "reading") continue;
    const text = typeof value === "object" ? JSON.stringify(value) : String(value);
    list.append(element("dt", { textContent: name }), element("dd", { textContent: text }));
  }
  return element("details", {}, element("summary", { textContent: "All settings" }), list);
}

/** Puts a result's settings into the form. */
function fill({ settings }) {
  clearErrors();
  $("prompt").value = settings.prompt;
  if ($("negative")) $("negative").value = settings.negative ?? "";
  $("seconds").value = shown(settings.frames / settings.fps);
  $("size").value = settings.size.join("x");
  for (const name of ["seed", "steps", "guidance"]) $(name).value = settings[name];
  $("num").value = 1;
  for (const box of form.querySelectorAll("[name=lora]")) {
    box.checked = (settings.lora ?? []).includes(box.value);
  }
  shots = model.shots
    ? (settings.shots ?? []).map(([start, caption]) => ({ start, caption })) : [];
  given = (settings.given ?? []).map((part) => ({ ...part,
    name: part.upload ? "the same frames" : "frames of a result",
    picture: part.upload ? `api/uploads/${part.upload}/picture` : `results/${part.result}.webp`,
    seconds: part.last / fps() }));
}

function toPrompt() {
  drawTimeline();
  form.scrollIntoView({ behavior: still ? "auto" : "smooth", block: "start" });
  $("prompt").focus({ preventScroll: true });
  $("prompt").select();
}

function again(result) {
  fill(result);
  toPrompt();
}

function goOn(result) {
  fill(result);
  const last = Math.min(model.given === "any" ? 1 + model.patch : 1, result.settings.frames);
  given = [{ result: result.id, at: 0, last, name: `the last ${last} frames of a result`,
    picture: `results/${result.id}.webp`, seconds: last / fps() }];
  shots = [];
  toPrompt();
}

// ------------------------------------------------------------------------------------------------

form.addEventListener("submit", (event) => { event.preventDefault(); generate(); });
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  }
});
$("random").addEventListener("click", () => {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 100000;
});
$("older").addEventListener("click", older);
listenToTimeline();
drawTimeline();
older().then(() => {
  document.body.dataset.ready = "";
  for (const job of remembered()) follow(job.id, job.prompt);
});
