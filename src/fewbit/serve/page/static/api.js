// Requests to the server that this page comes from, with the key if one was given; failures in the server's own words.

const KEY = "fewbit.api-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** What the server refuses or fails at; status 0: it could not be reached. */
export class ApiError extends Error {
  constructor(message, status = 0, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/** The names that requests may use. */
export async function models() {
  return (await (await call("v1/models")).json()).data.map((card) => card.id);
}

/** The text of /metrics. */
export async function metrics() {
  return (await call("metrics")).text();
}

/** The objects of a streamed answer, until the server says that it is complete. */
export async function* stream(path, body, signal) {
  const response = await call(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  let rest = "", complete = false;
  for await (const text of chunks(response.body.pipeThrough(new TextDecoderStream()))) {
    const blocks = (rest + text).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
      if (!data.length) continue; // a comment that keeps the connection open
      if (data[0] === "[DONE]") complete = true;
      if (complete) continue; // to the very end, so that the connection can be used again
      const part = JSON.parse(data.join("\n"));
      if (part.error) throw new ApiError(part.error.message, part.error.code, part.error.param);
      yield part;
    }
  }
  if (!complete) throw new ApiError("The connection ended before the answer was complete.");
}

async function* chunks(readable) {
  const reader = readable.getReader(); // not every browser can iterate over a stream itself
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
  } finally {
    reader.cancel().catch(() => {}); // it may have failed or been aborted already
  }
}

async function call(path, { headers = {}, ...options } = {}) {
  let response;
  try {
    response = await fetch(path, {
      ...options,
      headers: withKey(headers),
      credentials: "same-origin",
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

function withKey(headers) {
  const given = key.get();
  try {
    return new Headers(given ? { ...headers, Authorization: `Bearer ${given}` } : headers);
  } catch {
    throw new ApiError("The API key holds characters that a header cannot carry.");
  }
}

async function refusal(response) {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    return new ApiError(error.message ?? error, response.status, error.param ?? null);
  } catch {
    return new ApiError(text || `The server answered ${response.status} ${response.statusText}.`, response.status);
  }
}
