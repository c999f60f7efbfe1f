// A picture to change, and the mask painted over it: with the mouse or a finger, or with arrow keys
// and the space bar. White in the mask is what the model draws again.

const PAINT = "rgb(36 87 167 / 0.55)";

export class Mask {
  constructor(canvas, brush) {
    this.canvas = canvas;
    this.brush = brush; // the slider of its width
    this.paint = document.createElement("canvas");
    this.paint.width = canvas.width;
    this.paint.height = canvas.height;
    this.picture = null;
    this.painted = false;
    this.at = { x: canvas.width / 2, y: canvas.height / 2 }; // of the brush, for the keys
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.stroke(event, false);
    });
    canvas.addEventListener("pointermove", (event) => event.buttons && this.stroke(event, true));
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("focus", () => this.show());
    canvas.addEventListener("blur", () => this.show());
  }

  /** Take a picture, as a URL; its middle square, as the model does. */
  async take(url) {
    const image = new Image();
    image.src = url;
    await image.decode();
    const square = document.createElement("canvas");
    square.width = square.height = this.canvas.width;
    const side = Math.min(image.naturalWidth, image.naturalHeight);
    const left = (image.naturalWidth - side) / 2;
    const top = (image.naturalHeight - side) / 2;
    const context = square.getContext("2d");
    context.imageSmoothingEnabled = side > square.width; // enlarged, pixels stay squares
    context.drawImage(image, left, top, side, side, 0, 0, square.width, square.width);
    this.picture = square;
    this.clear();
  }

  clear() {
    this.paint.getContext("2d").clearRect(0, 0, this.paint.width, this.paint.height);
    this.painted = false;
    this.show();
  }

  /** Paint a line from the last place of the brush, or a dot. */
  draw(x, y, line) {
    const context = this.paint.getContext("2d");
    context.strokeStyle = "white";
    context.lineCap = "round";
    context.lineWidth = Number(this.brush.value);
    context.beginPath();
    context.moveTo(line ? this.at.x : x, line ? this.at.y : y);
    context.lineTo(x, y);
    context.stroke();
    this.at = { x, y };
    this.painted = true;
    this.show();
    this.canvas.dispatchEvent(new Event("painted"));
  }

  stroke(event, line) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    this.draw((event.clientX - box.left) * scale, (event.clientY - box.top) * scale, line);
  }

  key(event) {
    const step = Number(this.brush.value) / 2;
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = moves[event.key];
    if (!move && event.key !== " ") return;
    event.preventDefault();
    if (move) {
      const within = (n) => Math.min(this.canvas.width, Math.max(0, n));
      this.at = { x: within(this.at.x + step * move[0]), y: within(this.at.y + step * move[1]) };
      this.show();
    } else {
      this.draw(this.at.x, this.at.y, false);
    }
  }

  /** The picture, the paint over it, and with the keyboard's focus the brush. */
  show() {
    const context = this.canvas.getContext("2d");
    const { width, height } = this.canvas;
    context.clearRect(0, 0, width, height);
    const tinted = document.createElement("canvas");
    tinted.width = width;
    tinted.height = height;
    const tint = tinted.getContext("2d");
    tint.drawImage(this.paint, 0, 0);
    tint.globalCompositeOperation = "source-in";
    tint.fillStyle = PAINT;
    tint.fillRect(0, 0, width, height);
    if (this.picture) context.drawImage(this.picture, 0, 0);
    context.drawImage(tinted, 0, 0);
    if (this.canvas.matches(":focus-visible")) {
      context.strokeStyle = "red";
      context.lineWidth = 2;
      context.beginPath();
      context.arc(this.at.x, this.at.y, Number(this.brush.value) / 2, 0, 2 * Math.PI);
      context.stroke();
    }
  }

  /** {image, mask} as data URLs for a request; without paint no mask. */
  given() {
    if (!this.picture) return {};
    const image = this.picture.toDataURL("image/png");
    if (!this.painted) return { image };
    const mask = document.createElement("canvas");
    mask.width = this.canvas.width;
    mask.height = this.canvas.height;
    const context = mask.getContext("2d");
    context.fillStyle = "black";
    context.fillRect(0, 0, mask.width, mask.height);
    context.drawImage(this.paint, 0, 0);
    return { image, mask: mask.toDataURL("image/png") };
  }
}

/** Have a picture file, chosen or dropped on `area`, given to `take` as a data URL. */
export function takeFiles(area, input, take) {
  const read = (file) => {
    if (!file) return;
    const reader = new FileReader();
    reader.addEventListener("load", () => take(reader.result));
    reader.readAsDataURL(file);
  };
  input.addEventListener("change", () => read(input.files[0]));
  area.addEventListener("dragover", (event) => {
    event.preventDefault();
    area.classList.add("over");
  });
  area.addEventListener("dragleave", () => area.classList.remove("over"));
  area.addEventListener("drop", (event) => {
    event.preventDefault();
    area.classList.remove("over");
    read(event.dataTransfer.files[0]);
  });
}
