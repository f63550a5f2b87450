// The server's HTTP API: the key, errors in the server's words, and the events of a stream.
// It does not know the page.

const KEY = "mlxd.key";

/** An answer that is an error, or none at all (status 0). */
export class ApiError extends Error {
  constructor(message, status = 0, requestId = null) {
    super(message);
    this.status = status;
    this.requestId = requestId;
  }
}

export class Api {
  /** `onUnauthorized(message)` is called at every 401; `message` is empty where no key was sent. */
  constructor(storage, onUnauthorized) {
    this.storage = storage;
    this.onUnauthorized = onUnauthorized;
  }

  get key() {
    return this.storage.getItem(KEY) ?? "";
  }

  set key(value) {
    if (value) this.storage.setItem(KEY, value);
    else this.storage.removeItem(KEY);
  }

  async json(path, options) {
    return (await this.request(path, options)).json();
  }

  /** A response that is none of an error; throws ApiError, or AbortError once `signal` says so. */
  async request(path, { method = "GET", body, signal } = {}) {
    const key = this.key;
    const headers = {};
    if (key) headers.authorization = `Bearer ${asHeader(key)}`;
    if (body !== undefined) headers["content-type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method, headers, signal, cache: "no-store", body: JSON.stringify(body) });
    } catch (error) {
      throw error.name === "AbortError" ? error : new ApiError("The server cannot be reached.");
    }
    if (response.ok) return response;
    const error = await errorOf(response);
    if (error.status === 401) {
      this.key = "";
      this.onUnauthorized(key ? error.message : "");
    }
    throw error;
  }

  /** The chunks of a chat answer as they come. Throws ApiError where the stream brings one, or breaks off. */
  async *chat(body, signal) {
    const response = await this.request("v1/chat/completions", {
      method: "POST",
      body: { ...body, stream: true, stream_options: { include_usage: true } },
      signal,
    });
    const requestId = response.headers.get("x-request-id");
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await nextOf(reader, requestId);
      if (done) throw new ApiError("The connection ended before the answer did.", 0, requestId);
      const frames = (rest + value).split("\n\n");
      rest = frames.pop();
      for (const frame of frames) {
        if (!frame.startsWith("data: ")) continue; // a comment, which keeps the connection alive
        const data = frame.slice("data: ".length);
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(chunk.error.message, response.status, requestId);
        yield chunk;
      }
    }
  }
}

async function nextOf(reader, requestId) {
  try {
    return await reader.read();
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError("The connection broke.", 0, requestId);
  }
}

async function errorOf(response) {
  const requestId = response.headers.get("x-request-id");
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message ?? message;
  } catch {
    // not of this server: a proxy's page
  }
  return new ApiError(message, response.status, requestId);
}

/** fetch() refuses characters that are not one byte; the server has to say itself that such a key is wrong. */
function asHeader(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}
