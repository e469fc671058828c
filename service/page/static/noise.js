// Noise, as an image before there is an image.

function gaussian() {
  return Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
}

/** A picture of standard normal noise, on the scale of pixels, as a URL. */
export function noise({ size, channels }) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(size, size);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const grey = 128 + 64 * gaussian();
    for (let channel = 0; channel < 3; channel++) {
      pixels.data[i + channel] = channels === 1 ? grey : 128 + 64 * gaussian();
    }
    pixels.data[i + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  return canvas.toDataURL();
}
