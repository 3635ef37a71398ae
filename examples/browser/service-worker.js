/**
 * Keeps every file of the page and the library, so that it works without a network after the first visit. The model's files,
 * asked for by their hash, are kept by model-files.js.
 *
 * With a network, the server is asked whether it has a newer one. The two headers isolate the page from other origins, for
 * which browsers give WebAssembly threads.
 */

const CACHE = "delta-llava";
const ISOLATION = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  const { origin, searchParams } = new URL(url);
  if (method === "GET" && origin === location.origin && !searchParams.has("sha256")) event.respondWith(respond(event));
});

async function respond(event) {
  const cache = await caches.open(CACHE);
  const kept = await cache.match(event.request);
  let response;
  try {
    response = await fetch(event.request.url, { headers: unlessUnchanged(kept), cache: "no-store" });
  } catch (error) {
    if (!kept) throw error;
  }
  if (!response?.ok) return kept ?? response; // unchanged, or the server is out of order
  response = new Response(response.body, { headers: [...response.headers, ...Object.entries(ISOLATION)] });
  // Not awaited here: the page reads while the file is being stored. A full disk costs no more than working offline.
  event.waitUntil(cache.put(event.request, response.clone()).catch(console.warn));
  return response;
}

/** Headers with which a server answers 304 where its file is the one that is kept. */
function unlessUnchanged(kept) {
  const conditions = { ETag: "If-None-Match", "Last-Modified": "If-Modified-Since" };
  const known = Object.keys(conditions).filter((name) => kept?.headers.has(name));
  return Object.fromEntries(known.map((name) => [conditions[name], kept.headers.get(name)]));
}
