/** The page: an image, a question, a number of visual tokens, and what the worker answers. */

const parts = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const settings = Object.fromEntries(new URLSearchParams(location.search)); // ?model=FOLDER&dtype=q4&device=wasm
let budgets = []; // numbers of visual tokens, smallest first
let hasImage = false;
let turn = 0; // counts the images: what the worker says about an earlier one is too late
let worker;

parts.form.reset(); // browsers put back what a field showed
await keepFiles();
startWorker();

/**
 * Let the service worker keep all files. On the first visit it starts too late for those that are here already: load the page
 * again, once. Where it is not to be had (in a private window, say) the page works with a network, and slower.
 */
async function keepFiles() {
  try {
    const { controller } = navigator.serviceWorker;
    await navigator.serviceWorker.register("service-worker.js");
    await navigator.serviceWorker.ready;
    if (controller || sessionStorage.reloaded) return;
  } catch {
    return;
  }
  sessionStorage.reloaded = true;
  location.reload();
  await new Promise(() => {}); // until the page is gone
}

function startWorker() {
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = ({ data: { type, ...values } }) => {
    if ([undefined, turn].includes(values.turn)) HANDLERS[type](values);
  };
  worker.onerror = () => HANDLERS.error({ message: "transformers.js did not load: run `npm ci` in the page's folder." });
  worker.postMessage({ type: "load", repo: settings.model ?? "model", dtype: settings.dtype, device: settings.device });
}

const HANDLERS = {
  progress({ percent, total }) {
    parts.progress.value = percent;
    parts.status.textContent = `Loading ${(total / 1e6).toFixed(0)} MB, once …`;
  },

  ready({ device, visualTokenBudgets, numVisualTokens }) {
    budgets = visualTokenBudgets;
    parts.tokens.max = budgets.length - 1;
    parts.tokens.value = budgets.indexOf(numVisualTokens);
    parts.tokens.disabled = false;
    showBudget();
    parts.progress.hidden = true;
    const offline = navigator.serviceWorker?.controller ? " From now on it works without a network." : "";
    parts.status.textContent = `Ready, on ${device === "webgpu" ? "WebGPU" : "WebAssembly"}.${offline}`;
    setBusy(false);
  },

  image({ width, height }) {
    parts.hint.textContent = `${width} × ${height} pixels`;
    hasImage = true;
    setBusy(false);
  },

  text({ text }) {
    parts.answer.textContent = (parts.answer.textContent + text).trimStart();
  },

  answer({ text, tokens, times, numVisualTokens }) {
    parts.answer.textContent = text;
    const milliseconds = [times.vision, times.firstToken, times.rest].map((time) => `${Math.round(time)} ms`);
    const row = parts.rows.insertRow(0);
    for (const cell of [numVisualTokens, text, ...milliseconds, tokens.length]) row.insertCell().textContent = cell;
    parts.history.hidden = false;
    setBusy(false);
  },

  error({ message }) {
    parts.progress.hidden = true;
    parts.answer.textContent = message;
    parts.answer.classList.add("error");
    if (turn && !hasImage) clearPreview();
    setBusy(false);
  },
};

/** While the model answers it can be stopped, and screen readers wait for the whole answer. */
function setBusy(busy) {
  parts.ask.disabled = busy || !budgets.length || !hasImage;
  parts.stop.disabled = !busy;
  parts.answer.setAttribute("aria-busy", busy);
}

function showBudget() {
  const number = budgets[parts.tokens.value];
  parts.number.textContent = number;
  parts.tokens.setAttribute("aria-valuetext", `${number} visual token${number === 1 ? "" : "s"}`);
}

function clearPreview() {
  URL.revokeObjectURL(parts.preview.src);
  parts.preview.hidden = true;
  parts.file.value = "";
  parts.hint.textContent = "Choose an image, or drop one here.";
}

function choose(file) {
  if (!file) return;
  worker.postMessage({ type: "stop" }); // an answer about the image before
  turn += 1;
  hasImage = false;
  setBusy(false);
  parts.answer.classList.remove("error");
  URL.revokeObjectURL(parts.preview.src);
  parts.preview.src = URL.createObjectURL(file);
  parts.preview.alt = `The image to ask about: ${file.name}`;
  parts.preview.hidden = false;
  parts.answer.textContent = "";
  worker.postMessage({ type: "image", turn, file });
}

parts.form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (parts.ask.disabled) return;
  parts.answer.textContent = "";
  parts.answer.classList.remove("error");
  setBusy(true);
  worker.postMessage({ type: "ask", turn, question: parts.question.value, numVisualTokens: budgets[parts.tokens.value] });
});
addEventListener("pageshow", ({ persisted }) => persisted && location.reload());
parts.stop.addEventListener("click", () => worker.postMessage({ type: "stop" }));
parts.tokens.addEventListener("input", showBudget);
parts.file.addEventListener("change", () => choose(parts.file.files[0]));
for (const name of ["dragover", "dragleave", "drop"]) {
  parts.drop.addEventListener(name, (event) => {
    event.preventDefault();
    parts.drop.classList.toggle("over", name === "dragover");
    if (name !== "drop" || !event.dataTransfer.files.length) return;
    parts.file.files = event.dataTransfer.files; // so that the field names it
    choose(parts.file.files[0]);
  });
}
