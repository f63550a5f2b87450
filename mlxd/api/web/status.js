// The live view of /v1/status, and how often it is asked for.
// It does not know the chat.

import { byId, element, setText } from "./dom.js";

const WATCHED_MS = 1000; // the view is open
const IN_BACKGROUND_MS = 5000; // another view is: only the header's word is shown
const MAX_BACKOFF_MS = 30000;

// [name, text of a status, [level, most] of one]
const LOAD = [
  ["Running", (s) => String(s.num_running)],
  ["Waiting", (s) => String(s.num_waiting)],
  ["Tokens/s", (s) => s.requests.reduce((sum, r) => sum + r.tokens_per_second, 0).toFixed(1)],
  ["KV cache", kvCache, (s) => [s.cache.used_blocks ?? 0, s.cache.total_blocks || 1]],
  ["Prompt tokens from cache", (s) => percent(s.cache.hit_rate), (s) => [s.cache.hit_rate, 1]],
  ["Device memory", (s) => `${gb(s.metal.active_memory_gb)} now, ${gb(s.metal.peak_memory_gb)} peak`],
];

const SERVER = [
  ["Requests served", (s) => count(s.total_requests_processed)],
  ["Tokens in / out", (s) => `${count(s.total_prompt_tokens)} / ${count(s.total_completion_tokens)}`],
  ["Preempted", (s) => count(s.num_preempted)],
  ["Worker restarts", (s) => count(s.worker.restarts)],
  ["Worker", (s) => [s.worker.device ?? s.worker.state, s.worker.dtype, s.worker.attention].filter(Boolean).join(", ")],
  ["Model", (s) => s.model ?? "none"],
  ["Up for", (s) => duration(s.uptime_s)],
  ["Heartbeat", (s) => `${s.worker.heartbeat_age_s.toFixed(1)} s ago`],
  ["Event loop lag", (s) => `${s.loop_lag.p99_ms.toFixed(1)} ms (99 %)`],
];

const COLUMNS = [
  ["Request", (r) => r.request_id],
  ["Phase", (r) => r.phase],
  ["Generated", (r) => `${count(r.generated_tokens)} of ${count(r.max_tokens)}`],
  ["Tokens/s", (r) => r.tokens_per_second.toFixed(1)],
  ["Prompt", promptOf],
  ["Cache hit", (r) => (r.cached_tokens ? `${r.cache_hit_type}, ${count(r.cached_tokens)}` : r.cache_hit_type)],
  ["Queued", (r) => `${r.queue_s.toFixed(2)} s`],
  ["First token", (r) => (r.ttft_s === null ? "–" : `${r.ttft_s.toFixed(2)} s`)],
  ["Elapsed", (r) => `${r.elapsed_s.toFixed(1)} s`],
];

export class StatusView {
  /** `onRunning()` is called whenever the server has come to run the model. */
  constructor(api, onRunning) {
    this.api = api;
    this.onRunning = onRunning;
    this.watched = false;
    this.failures = 0;
    this.timer = 0;
    this.asking = false;
    this.rows = new Map();
    this.tiles = [...tiles(byId("load"), LOAD), ...tiles(byId("server"), SERVER)];
    const heads = COLUMNS.map(([name]) => element("th", { scope: "col" }, name));
    byId("requests").tHead.rows[0].append(...heads, element("th", { scope: "col" }, element("span", { className: "unseen" }, "Cancel")));
    document.addEventListener("visibilitychange", () => this.poll());
  }

  /** Whether the view is open. */
  watch(watched) {
    this.watched = watched;
    this.poll();
  }

  /** Ask now, and from then on as often as it makes sense: never while the page is hidden. */
  async poll() {
    clearTimeout(this.timer);
    if (document.hidden || this.asking) return;
    this.asking = true;
    try {
      this.show(await this.api.json("v1/status"));
      this.failures = 0;
    } catch (error) {
      this.failures++;
      this.showState(error.status === 401 ? "needs a key" : "unreachable");
      setText(byId("status-problem"), error.message);
    } finally {
      this.asking = false;
    }
    const usual = this.watched ? WATCHED_MS : IN_BACKGROUND_MS;
    this.timer = setTimeout(() => this.poll(), Math.min(MAX_BACKOFF_MS, usual * 2 ** this.failures));
  }

  show(status) {
    setText(byId("status-problem"), "");
    this.showState(status.status.replace("_", " "));
    if (!this.watched) return;
    for (const show of this.tiles) show(status);
    this.showRequests(status.requests);
    byId("warnings").replaceChildren(...status.worker.warnings.map((warning) => element("li", {}, warning)));
  }

  showState(state) {
    if (state === "running" && byId("state").textContent !== state) this.onRunning();
    setText(byId("state"), state);
    byId("state").dataset.state = state;
  }

  /** Rows stay with their requests, so that a button does not move away under the finger. */
  showRequests(requests) {
    const body = byId("requests").tBodies[0];
    byId("no-requests").hidden = requests.length > 0;
    byId("requests").hidden = requests.length === 0;
    const rows = new Map();
    for (const request of requests) {
      const row = this.rows.get(request.request_id) ?? this.row(request.request_id);
      COLUMNS.forEach(([, text], i) => setText(row.cells[i], text(request)));
      rows.set(request.request_id, row);
      if (!row.isConnected) body.append(row);
    }
    for (const [id, row] of this.rows) if (!rows.has(id)) row.remove();
    this.rows = rows;
  }

  row(id) {
    const cells = COLUMNS.map(([name]) => {
      const cell = element("td");
      cell.dataset.label = name;
      return cell;
    });
    const cancel = element("button", { type: "button", className: "quiet", textContent: "Cancel" });
    cancel.setAttribute("aria-label", `Cancel ${id}`);
    cancel.addEventListener("click", async () => {
      cancel.disabled = true;
      try {
        await this.api.request(`v1/requests/${encodeURIComponent(id)}/cancel`, { method: "POST" });
      } catch (error) {
        cancel.disabled = false;
        setText(byId("status-problem"), error.message);
      }
    });
    return element("tr", {}, ...cells, element("td", {}, cancel));
  }
}

/** Fills `list` with a tile for each row of `table`; returns what shows a status in each. */
function tiles(list, table) {
  return table.map(([name, text, level]) => {
    const value = element("dd");
    const bar = level ? element("progress", { max: 1, value: 0, ariaLabel: name }) : null;
    list.append(element("div", {}, element("dt", {}, name), value, ...(bar ? [bar] : [])));
    return (status) => {
      setText(value, text(status));
      if (bar) {
        const [now, most] = level(status);
        bar.value = now / most;
      }
    };
  });
}

/** A prompt's length; while it is computed, how far that has come. */
function promptOf({ phase, computed_tokens: computed, prompt_tokens: length }) {
  return phase === "prefill" ? `${count(Math.min(computed, length))} of ${count(length)}` : count(length);
}

function kvCache({ cache }) {
  return `${count(cache.used_blocks ?? 0)} of ${count(cache.total_blocks ?? 0)} blocks`;
}

function count(number) {
  return number.toLocaleString("en");
}

function percent(fraction) {
  return `${(fraction * 100).toFixed(1)} %`;
}

function gb(number) {
  return `${number.toFixed(2)} GB`;
}

function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  const hours = Math.floor(minutes / 60);
  if (hours >= 48) return `${Math.floor(hours / 24)} days`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.floor(seconds)} s`;
}
