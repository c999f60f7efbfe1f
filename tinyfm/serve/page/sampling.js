// From logits to probabilities, as in tinyfm/generate.py: temperature, top-k, top-p, min-p. The
// logits come from the server once; moving a slider only computes this again.
// A filter sets the logits that it excludes to -Infinity; the largest always stays.

export function softmax(logits) {
  let largest = -Infinity;
  for (const logit of logits) largest = Math.max(largest, logit);
  const p = Float64Array.from(logits, (logit) => Math.exp(logit - largest));
  const total = p.reduce((sum, share) => sum + share, 0);
  return p.map((share) => share / total);
}

/** The indices of numbers, the largest first; equal ones in their order. */
export function order(numbers) {
  return Array.from(numbers, (_, i) => i).sort((a, b) => numbers[b] - numbers[a] || a - b);
}

/** Keep the k likeliest tokens, and those as likely as the last of them. */
export function keepTopK(logits, k) {
  const smallest = logits[order(logits)[k - 1]];
  return logits.map((logit) => (logit < smallest ? -Infinity : logit));
}

/** Keep the fewest likeliest tokens whose probabilities sum to at least topP. */
export function keepNucleus(logits, topP) {
  const p = softmax(logits);
  const kept = logits.map(() => -Infinity);
  let before = 0;
  for (const i of order(logits)) {
    if (before >= topP) break; // likelier tokens already sum to topP
    kept[i] = logits[i];
    before += p[i];
  }
  return kept;
}

/** Keep the tokens with at least this share of the probability of the likeliest one. */
export function keepMinP(logits, share) {
  const p = softmax(logits);
  const least = share * p.reduce((a, b) => Math.max(a, b), 0);
  return logits.map((logit, i) => (p[i] < least ? -Infinity : logit));
}

/** The probabilities from which a token is drawn. Temperature 0 takes the likeliest. */
export function probabilities(logits, { temperature, topK, topP, minP }) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  if (temperature === 0) {
    const likeliest = logits.indexOf(largest);
    return Float64Array.from(logits, (_, i) => Number(i === likeliest));
  }
  let kept = Float64Array.from(logits, (logit) => (logit - largest) / temperature);
  if (topK > 0 && topK < kept.length) kept = keepTopK(kept, topK);
  if (topP < 1) kept = keepNucleus(kept, topP);
  if (minP > 0) kept = keepMinP(kept, minP);
  return softmax(kept);
}

/** Base64 of little-endian float32 -> numbers. */
export function fromBase64(text) {
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float64Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}
