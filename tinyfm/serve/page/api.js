// Talks to the server: JSON, and server-sent events.

let key = sessionStorage.getItem("key") ?? "";

/** The key that every request carries, if the server demands one; kept until the tab is closed. */
export function setKey(value) {
  key = value;
  sessionStorage.setItem("key", value);
}

function headers(more = {}) {
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

/** The answer, or an Error with the server's sentence. */
async function checked(answer) {
  if (answer.ok) return answer;
  let message = `the server answered ${answer.status}`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // no JSON: the status has to do
  }
  const error = new Error(message);
  error.status = answer.status;
  throw error;
}

export async function get(path, query = {}) {
  const words = new URLSearchParams(query);
  const url = words.size ? `${path}?${words}` : path;
  return (await checked(await fetch(url, { headers: headers() }))).json();
}

/** The object URL of a file, for an <img>, which could not send the key; and text files as text. */
export async function getFile(path, query) {
  const url = `${path}?${new URLSearchParams(query)}`;
  const answer = await checked(await fetch(url, { headers: headers() }));
  if (answer.headers.get("content-type").startsWith("text/")) return { text: await answer.text() };
  return { url: URL.createObjectURL(await answer.blob()) };
}

function send(path, body, signal) {
  return fetch(path, {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify(body),
    signal,
  });
}

export async function post(path, body, signal) {
  return (await checked(await send(path, body, signal))).json();
}

/**
 * The events of an answer, one by one. An event is a line "data: JSON" and an empty line; the last
 * one is "data: [DONE]". An event with "error" ends the stream.
 */
export async function* events(path, body, signal) {
  const answer = await checked(await send(path, body, signal));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:"));
      const text = data.map((line) => line.slice(5).trim()).join("\n");
      if (text === "[DONE]") return;
      if (!text) continue;
      const event = JSON.parse(text);
      if (event.error) throw new Error(event.error.message ?? event.error);
      yield event;
    }
  }
}
