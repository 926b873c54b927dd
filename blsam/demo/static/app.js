// What the visitor sees: the state of one photo, and what the server is asked for. All of it lives in this tab.

import { PhotoCanvas } from "./canvas.js";

const $ = (id) => document.getElementById(id);

class App {
  constructor(root) {
    this.config = JSON.parse(root.dataset.config);
    this.photo = null; // {id, width, height, note, name, file}
    this.history = []; // prompts, {points, box}, oldest first; the last one is shown
    this.masks = []; // {score, overlay}; the overlay comes later where it was not chosen
    this.chosen = 0;
    this.keep = this.config.keep_ratio;
    this.times = new Map(); // keep ratio -> seconds of the encoder on this photo, and the runtime that they are of
    this.asked = 0; // number of the last question; older answers are dropped
    this.running = false;
    this.canvas = new PhotoCanvas($("photo"), {
      point: (x, y, label) => this.prompt({ points: [...this.now.points, [x, y, label]], box: this.now.box }),
      box: (...box) => this.prompt({ points: [], box }),
    }, () => Number(document.querySelector("#blsam input[name=mode]:checked").value));
    this.listen(root);
    this.fill();
  }

  get now() { return this.history.at(-1) || { points: [], box: null }; }
  get settings() { return { keep_ratio: this.keep }; }

  listen(root) {
    $("file").addEventListener("change", ({ target }) => { if (target.files[0]) this.open(target.files[0]); target.value = ""; });
    root.addEventListener("dragover", (event) => { event.preventDefault(); $("stage").classList.add("over"); });
    root.addEventListener("dragleave", () => $("stage").classList.remove("over"));
    root.addEventListener("drop", (event) => {
      event.preventDefault();
      $("stage").classList.remove("over");
      const file = event.dataTransfer.files[0];
      if (file) this.open(file);
    });
    document.addEventListener("paste", (event) => { if (event.clipboardData.files[0]) this.open(event.clipboardData.files[0]); });
    $("another").addEventListener("click", () => this.close());
    $("undo").addEventListener("click", () => this.undo());
    $("clear").addEventListener("click", () => this.clear());
    $("everything").addEventListener("click", () => this.everything());
    $("routing").addEventListener("change", () => this.background());
    $("keep").addEventListener("input", ({ target }) => { $("keep-value").value = Number(target.value).toFixed(2); });
    $("keep").addEventListener("change", ({ target }) => this.setKeep(Number(target.value)));
    for (const button of root.querySelectorAll("[data-export]")) button.addEventListener("click", () => this.download(button.dataset.export));
    $("photo").addEventListener("keydown", (event) => this.key(event));
    window.addEventListener("resize", () => this.canvas.draw());
  }

  fill() { // what depends on the model
    $("keep-value").value = this.keep.toFixed(2);
    const layers = this.config.layers;
    const stages = layers.map((layer, i) => [i, `chosen after layer ${layer}`]);
    const options = layers.length ? [["", "not shown"], ["all", "how often each token was chosen"], ...stages] : [["", "everywhere: an exact model"]];
    $("routing").replaceChildren(...options.map(([value, text]) => new Option(text, value)));
    $("routing").disabled = $("keep").disabled = !layers.length;
    if (!layers.length) $("keep-hint").textContent = "An exact model: every token runs through every block.";
    $("examples").replaceChildren(...this.config.examples.map((name) => {
      const button = document.createElement("button");
      const image = Object.assign(new Image(), { src: `api/examples/${name}.jpg`, alt: "" });
      const label = Object.assign(document.createElement("span"), { textContent: name });
      button.append(image, label);
      button.addEventListener("click", () => this.example(name));
      return button;
    }));
    this.render();
  }

  // --- photo ---

  async example(name) {
    await this.work("Fetching the example", async () => {
      const blob = await (await this.fetch(`api/examples/${name}.jpg`)).blob();
      await this.load(new File([blob], `${name}.jpg`, { type: blob.type }));
    });
  }

  async open(file) {
    await this.work("Reading the photo", () => this.load(file));
  }

  async load(file) {
    if (file.size > this.config.max_bytes) throw new Error(`The file is larger than ${this.config.max_bytes >> 20} MB.`);
    const photo = { ...(await this.upload(file)), name: file.name, file };
    const picture = await bitmap(await (await this.fetch(`api/photos/${photo.id}/preview`)).blob());
    Object.assign(this, { photo, preview: picture, history: [], masks: [], view: "prompt" });
    this.times.clear();
    $("routing").value = "";
    $("welcome").hidden = true;
    $("photo").hidden = $("another").hidden = $("tools").disabled = false;
    this.canvas.open(picture, [photo.width, photo.height]);
    $("photo").focus({ preventScroll: true });
    this.render();
    await this.encode();
    this.say(`${photo.width} x ${photo.height} pixels${photo.note && ` (${photo.note})`}, ready: click an object.`);
  }

  async upload(file) {
    return (await this.fetch("api/photos", { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } })).json();
  }

  close() {
    this.photo = null;
    this.asked++;
    $("welcome").hidden = false;
    $("photo").hidden = $("another").hidden = $("tools").disabled = true;
    this.say("Take an example, or a photo of yours.");
  }

  async encode() {
    const taken = await this.ask("encode", this.settings);
    this.times.set(this.keep, taken);
    this.render();
    return taken.seconds;
  }

  async setKeep(keep) {
    this.keep = keep;
    await this.work("Encoding again", async () => {
      const seconds = await this.encode();
      await this.background();
      this.say(`Keep ratio ${keep.toFixed(2)}: the encoder took ${ms(seconds)}.`);
    });
    if (this.now.points.length || this.now.box) await this.refresh();
    else this.showPrompt();
  }

  // --- prompts and masks ---

  prompt(next) {
    this.history.push(next);
    return this.refresh();
  }

  undo() {
    if (this.view === "everything") return this.showPrompt();
    this.history.pop();
    return this.refresh();
  }

  clear() {
    if (this.now.points.length || this.now.box) this.history.push({ points: [], box: null });
    return this.refresh();
  }

  async refresh() { // masks of the prompt that is shown; clicks made meanwhile are answered together
    this.view = "prompt";
    this.canvas.show({ ...this.now, overlay: this.masks[this.chosen]?.overlay || null });
    const number = ++this.asked;
    if (this.running) return;
    if (!this.now.points.length && !this.now.box) {
      this.masks = [];
      this.showPrompt();
      this.say("Click an object, or drag a box around it.");
      return;
    }
    this.running = true;
    const start = performance.now();
    try {
      const { masks, seconds } = await this.ask("masks", { ...this.settings, ...this.now });
      const chosen = masks.reduce((best, mask, i) => (mask.score > masks[best].score ? i : best), 0);
      const picture = await overlay(masks[chosen].overlay); // the others when it is on the screen
      if (number === this.asked) {
        this.masks = masks.map(({ score }, i) => ({ score, overlay: i === chosen ? picture : null }));
        this.chosen = chosen;
        this.showPrompt();
        const shown = this.masks;
        requestAnimationFrame(() => setTimeout(() => this.unpack(shown, masks).catch((error) => this.fail(error))));
        const all = performance.now() - start;
        this.say(`Three candidates in ${all.toFixed(0)} ms, ${(1e3 * seconds.decoder).toFixed(0)} of them decoder and upscaling.`);
        $("photo").dataset.answered = number;
      }
    } catch (error) {
      this.fail(error);
      if (number === this.asked) { this.history.pop(); this.showPrompt(); }
    } finally {
      this.running = false;
    }
    if (number !== this.asked && this.photo && this.view === "prompt") await this.refresh();
  }

  async unpack(shown, masks) { // the candidates that were not chosen, until others take their place
    for (const [i, mask] of shown.entries()) {
      if (this.masks !== shown) return;
      mask.overlay ||= await overlay(masks[i].overlay);
      if (this.masks === shown && this.chosen === i && this.view === "prompt") this.canvas.show({ overlay: mask.overlay });
    }
  }

  showPrompt() {
    this.view = "prompt";
    this.canvas.show({ ...this.now, overlay: this.masks[this.chosen]?.overlay || null });
    this.render();
  }

  choose(i) {
    if (!this.masks[i]) return;
    this.chosen = i;
    this.showPrompt();
  }

  async everything() {
    await this.work("Looking at 256 points", async () => {
      const number = ++this.asked;
      const found = await this.ask("everything", this.settings);
      const picture = await overlay(found.overlay);
      if (number !== this.asked) return; // a click came in between
      this.view = "everything";
      this.canvas.show({ points: [], box: null, overlay: picture });
      this.render();
      this.say(`${found.count} masks. Click to go back to one object.`);
    });
  }

  async background() { // the photo, or where the encoder looked
    const stage = $("routing").value, { id } = this.photo;
    let picture = this.preview;
    try {
      if (stage) {
        const query = new URLSearchParams({ keep_ratio: this.keep, stage: stage === "all" ? "" : stage });
        picture = await bitmap(await (await this.fetch(`api/photos/${id}/routing?${query}`)).blob());
        this.say(stage === "all" ? "Yellow: the token went through the wide blocks in every stage. Dark violet: in none."
          : "In colour: what went through the wide blocks. Dark: narrow blocks alone.");
      }
    } catch (error) { this.fail(error); }
    if (this.photo?.id === id && stage === $("routing").value) this.canvas.show({ picture });
  }

  async download(kind) {
    const everything = this.view === "everything";
    const file = everything ? "everything.json" : kind;
    await this.work("Making the file", async () => {
      const { name } = this.photo;
      const wanted = { ...this.settings, ...this.now, candidate: this.chosen, name };
      const blob = await (await this.post(`export/${file}`, wanted)).blob();
      const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob) });
      link.download = `${name.replace(/\.[^.]*$/, "")}_${file}`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
      this.say(`${link.download}: ${this.photo.width} x ${this.photo.height} pixels.`);
    });
  }

  // --- keyboard ---

  key(event) {
    if (event.altKey || event.metaKey || (event.ctrlKey && event.key !== "z")) return;
    const { key } = event;
    if (key === "Escape") this.clear();
    else if (key === "z" || key === "Backspace") this.undo();
    else if ("123".includes(key)) this.choose(Number(key) - 1);
    else if (!this.canvas.key(event)) return;
    event.preventDefault();
  }

  // --- server ---

  async fetch(url, options) {
    let answer;
    try { answer = await fetch(url, options); } catch { throw new Error("The server does not answer; is blsam demo still running?"); }
    if (answer.ok) return answer;
    const error = (await answer.json().catch(() => ({}))).error || `The server failed (${answer.status}).`;
    throw Object.assign(new Error(error), { status: answer.status });
  }

  async post(action, wanted) { // a photo that made room for others is brought again, once
    const { id, file } = this.photo;
    const send = () => this.fetch(`api/photos/${id}/${action}`, { method: "POST", body: JSON.stringify(wanted) });
    try { return await send(); } catch (error) {
      if (error.status !== 404) throw error;
      await this.upload(file);
      return send();
    }
  }

  async ask(action, wanted) { return (await this.post(action, wanted)).json(); }

  async work(text, job) { // with a sign that it goes on, and the seconds when it takes long
    const start = performance.now();
    const show = () => { const s = (performance.now() - start) / 1e3; $("busy-text").textContent = s < 1 ? text : `${text}, ${s.toFixed(0)} s`; };
    show();
    $("busy").hidden = false;
    const timer = setInterval(show, 500);
    try { await job(); } catch (error) { this.fail(error); } finally {
      clearInterval(timer);
      $("busy").hidden = true;
    }
  }

  say(text) { $("status").textContent = text; $("status").classList.remove("error"); }
  fail(error) { $("status").textContent = error.message; $("status").classList.add("error"); }

  // --- panel ---

  render() {
    const some = this.history.length > 0, everything = this.view === "everything";
    $("undo").disabled = !some && !everything;
    $("clear").disabled = !this.now.points.length && !this.now.box && !everything;
    for (const button of document.querySelectorAll("#blsam [data-export]"))
      button.disabled = everything ? button.dataset.export !== "coco.json" : !this.masks.length;
    $("candidates").replaceChildren(...[0, 1, 2].map((i) => this.candidate(i, !everything && this.masks[i])));
    const taken = [...this.times.values()], slowest = Math.max(...taken.map(({ seconds }) => seconds));
    const mixed = new Set(taken.map(({ runtime }) => runtime)).size > 1; // then the bars are no comparison of ratios alone
    $("times").classList.toggle("mixed", mixed);
    $("times").replaceChildren(...[...this.times].sort(([a], [b]) => a - b).map(([keep, { seconds, runtime }]) => {
      const row = document.createElement("div");
      row.className = keep === this.keep ? "now" : "";
      const [label, bar, text] = ["span", "b", "span"].map((tag) => document.createElement(tag));
      label.textContent = keep.toFixed(2);
      bar.style.width = `${(100 * seconds) / slowest}%`;
      text.textContent = mixed ? `${runtime}, ${ms(seconds)}` : ms(seconds);
      row.append(label, bar, text);
      return row;
    }));
  }

  candidate(i, mask) {
    const button = document.createElement("button"), bar = document.createElement("i");
    button.type = "button";
    button.setAttribute("role", "radio");
    button.setAttribute("aria-checked", Boolean(mask) && i === this.chosen);
    button.setAttribute("aria-label", mask ? `Candidate ${i + 1}, score ${mask.score.toFixed(2)}` : `Candidate ${i + 1}`);
    button.disabled = !mask;
    button.textContent = mask ? mask.score.toFixed(2) : "–";
    if (mask) bar.style.width = `${100 * Math.min(Math.max(mask.score, 0), 1)}%`;
    button.append(bar);
    button.addEventListener("click", () => { this.choose(i); $("candidates").children[i].focus(); });
    return button;
  }
}

const ms = (seconds) => `${(1e3 * seconds).toFixed(0)} ms`;
const bitmap = (blob) => createImageBitmap(blob);

async function overlay(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return bitmap(new Blob([bytes], { type: "image/png" }));
}

// Gradio puts the page together in the browser, so ours may not be there yet
function start() {
  const root = $("blsam");
  if (root && !root.dataset.started) { root.dataset.started = "yes"; window.blsam = new App(root); }
  return Boolean(root);
}
if (!start()) {
  const observer = new MutationObserver(() => { if (start()) observer.disconnect(); });
  observer.observe(document.documentElement, { childList: true, subtree: true });
}
