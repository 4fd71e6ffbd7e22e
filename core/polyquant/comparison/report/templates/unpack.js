"use strict";
// Scripts and data lie packed in the page: gzip, as base 85. Unpacked, a script runs by the hash that the page's policy holds.
const ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;,=>?@^_`{|}~"; // Python's b85, less <

function unpacked(text) {
  const digits = Object.fromEntries([...ALPHABET].map((sign, digit) => [sign, digit])), bytes = new Uint8Array(Math.ceil(text.length / 5) * 4);
  const view = new DataView(bytes.buffer), whole = text.padEnd(bytes.length / 4 * 5, ALPHABET.at(-1));
  for (let group = 0; group < bytes.length / 4; group++) {
    let value = 0;
    for (let index = 0; index < 5; index++) value = value * 85 + digits[whole[5 * group + index]];
    view.setUint32(4 * group, value);
  }
  const stream = new Blob([bytes.subarray(0, bytes.length - (whole.length - text.length))]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

(async () => {
  for (const packed of document.querySelectorAll("script[data-packed]")) {
    const text = await unpacked(packed.textContent);
    if (packed.type === "application/json") {
      packed.textContent = text;
      continue;
    }
    const script = document.createElement("script");
    script.text = text;
    document.body.append(script);
  }
})().catch((error) => { document.getElementById("plot").textContent = `This browser does not unpack the page's scripts (${error.message}); the tables below have all figures.`; });
