"use strict";

const result = document.getElementById("result");

function show(...nodes) {
  result.replaceChildren(...nodes);
}

function line(text) {
  const node = document.createElement("p");
  node.textContent = text;
  return node;
}

// The colours that repmlp-predict gives a mask: the bits of a class id are dealt to red, green and blue in turn.
function colour(id) {
  const levels = [0, 0, 0];
  for (let bit = 0; bit < 8; bit += 1) {
    for (let channel = 0; channel < 3; channel += 1) {
      levels[channel] |= ((id >> (3 * bit + channel)) & 1) << (7 - bit);
    }
  }
  return levels;
}

async function drawMask(base64) {
  const image = new Image();
  image.src = "data:image/png;base64," + base64;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data.set(colour(pixels.data[i]), i);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

async function describe(answer) {
  const found = Object.fromEntries(answer.outputs.map((output) => [output.name, output]));
  if (found.mask) {
    return [await drawMask(found.mask.data[0])];
  }
  if (found.vector) {
    return [line("vector: " + found.vector.data.slice(0, 8).map((value) => value.toFixed(4)).join(", ") + " …")];
  }
  const name = found.label.data[0] || "class " + found.index.data[0];
  return [line(name + ", score " + found.score.data[0].toFixed(4))];
}

document.getElementById("try").addEventListener("submit", async (event) => {
  event.preventDefault();
  const file = document.getElementById("file").files[0];
  const model = document.getElementById("model").value;
  const picture = document.createElement("img");
  picture.src = URL.createObjectURL(file);
  picture.alt = "the image that was sent";
  show(picture, line("…"));
  try {
    const start = performance.now();
    const response = await fetch("v2/models/" + encodeURIComponent(model) + "/infer", {
      method: "POST",
      headers: { "Inference-Header-Content-Length": "0" },
      body: file,
    });
    const answer = await response.json();
    if (!response.ok) {
      throw new Error(answer.error);
    }
    const took = line((performance.now() - start).toFixed(1) + " ms");
    show(picture, ...(await describe(answer)), took);
  } catch (error) {
    show(picture, line(String(error.message || error)));
  }
});
