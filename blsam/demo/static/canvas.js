// The photo with what lies on it, and the gestures on it. Knows nothing of the server.

const ADD = "rgb(60, 200, 60)", REMOVE = "rgb(230, 50, 50)", DRAG = 5; // CSS pixels that make a drag of a click

export class PhotoCanvas {
  // on: {point(x, y, label), box(x1, y1, x2, y2)}, in pixels of the photo. mode(): the label of a plain click.
  constructor(canvas, on, mode) {
    Object.assign(this, { canvas, on, mode, view: null, cross: null, corner: null, start: null, drag: null });
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.up(event));
    canvas.addEventListener("pointercancel", () => { this.start = this.drag = null; this.draw(); });
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("blur", () => { this.cross = this.corner = null; this.draw(); });
  }

  // size: [width, height] of the photo; picture: what is shown of it, smaller maybe
  open(picture, size) {
    this.canvas.width = picture.width;
    this.canvas.height = picture.height;
    this.canvas.style.setProperty("--ratio", picture.width / picture.height);
    this.size = size;
    this.cross = this.corner = this.start = this.drag = null;
    this.show({ picture, overlay: null, points: [], box: null });
  }

  show(view) { // some or all of picture, overlay, points [[x, y, label]], box [x1, y1, x2, y2]
    this.view = { ...this.view, ...view };
    this.draw();
  }

  // --- drawing ---

  draw() {
    if (!this.view) return;
    const { width, height } = this.canvas, context = this.canvas.getContext("2d");
    const { picture, overlay, points, box } = this.view;
    context.drawImage(picture, 0, 0, width, height);
    if (overlay) context.drawImage(overlay, 0, 0, width, height);
    const unit = width / (this.canvas.clientWidth || width), scale = width / this.size[0]; // of a CSS pixel
    const shown = this.drag || box || (this.corner && [...this.corner, ...this.cross]);
    if (shown) this.drawBox(context, shown.map((value) => value * scale), unit);
    for (const [x, y, label] of points) this.drawPoint(context, x * scale, y * scale, label, unit);
    if (this.cross) this.drawCross(context, this.cross[0] * scale, this.cross[1] * scale, unit);
  }

  drawBox(context, [x1, y1, x2, y2], unit) {
    for (const [colour, line] of [["white", 4], [ADD, 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = line * unit;
      context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    }
  }

  drawPoint(context, x, y, label, unit) {
    for (const [colour, radius] of [["white", 7], [label ? ADD : REMOVE, 5.5]]) {
      context.fillStyle = colour;
      context.beginPath();
      context.arc(x, y, radius * unit, 0, 2 * Math.PI);
      context.fill();
    }
    context.fillStyle = "white"; // a plus or a minus: not by colour alone
    context.fillRect(x - 3 * unit, y - 0.75 * unit, 6 * unit, 1.5 * unit);
    if (label) context.fillRect(x - 0.75 * unit, y - 3 * unit, 1.5 * unit, 6 * unit);
  }

  drawCross(context, x, y, unit) {
    for (const [colour, line] of [["black", 4], ["white", 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = line * unit;
      context.beginPath();
      context.moveTo(x - 14 * unit, y); context.lineTo(x + 14 * unit, y);
      context.moveTo(x, y - 14 * unit); context.lineTo(x, y + 14 * unit);
      context.stroke();
    }
  }

  // --- pointer ---

  at(event) { // pixels of the photo, within it
    const edge = this.canvas.getBoundingClientRect();
    const inside = (value, most) => Math.min(Math.max(value, 0), most);
    return [
      inside(((event.clientX - edge.left) / edge.width) * this.size[0], this.size[0]),
      inside(((event.clientY - edge.top) / edge.height) * this.size[1], this.size[1]),
    ];
  }

  down(event) {
    if (!event.isPrimary || ![0, 2].includes(event.button)) return;
    try { this.canvas.setPointerCapture(event.pointerId); } catch { /* a pointer that is gone already */ }
    this.start = { at: this.at(event), client: [event.clientX, event.clientY], button: event.button };
  }

  move(event) {
    if (!this.start || this.start.button) return;
    const far = Math.hypot(event.clientX - this.start.client[0], event.clientY - this.start.client[1]);
    if (far < DRAG && !this.drag) return;
    this.drag = sorted([...this.start.at, ...this.at(event)]);
    this.draw();
  }

  up(event) {
    const { start, drag } = this;
    this.start = this.drag = null;
    if (!start) return;
    if (drag) this.finishBox(drag);
    else this.on.point(...start.at, start.button === 2 || event.ctrlKey ? 0 : this.mode());
  }

  finishBox(box) {
    if (box[2] - box[0] >= 1 && box[3] - box[1] >= 1) this.on.box(...box);
    else this.draw();
  }

  // --- keyboard: true if the key meant something here ---

  key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const cross = this.cross || [this.size[0] / 2, this.size[1] / 2];
    if (steps[key]) {
      const step = Math.max(...this.size) / (event.shiftKey ? 400 : 40);
      this.cross = cross.map((value, i) => Math.min(Math.max(value + step * steps[key][i], 0), this.size[i]));
    } else if (key === "r" || ((key === "Enter" || key === " ") && event.shiftKey)) this.on.point(...cross, 0);
    else if (key === "Enter" || key === " ") this.on.point(...cross, this.mode());
    else if (key === "b" && !this.corner) [this.corner, this.cross] = [cross, cross];
    else if (key === "b") {
      const box = sorted([...this.corner, ...cross]);
      this.corner = null;
      this.finishBox(box);
    } else return false;
    this.draw();
    return true;
  }
}

function sorted([x1, y1, x2, y2]) {
  return [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)];
}
