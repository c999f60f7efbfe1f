// Moments in a row, with a slider through them and a button that plays them.

import { setSlider } from "./dom.js";

export class Film {
  /** show(moment) displays one. pause: milliseconds between two, when they are played. */
  constructor(slider, button, show, pause = 120) {
    this.slider = slider;
    this.button = button;
    this.show = show;
    this.pause = pause;
    this.moments = [];
    this.timer = 0;
    slider.addEventListener("input", () => {
      this.stop();
      this.turn(Number(slider.value));
    });
    button.addEventListener("click", () => (this.timer ? this.stop() : this.play()));
  }

  clear() {
    this.stop();
    this.moments = [];
    this.slider.disabled = this.button.disabled = true;
  }

  /** Add moments; show the last if the slider is at the end, as it is while pictures come in. */
  add(...moments) {
    const follow = Number(this.slider.value) >= this.moments.length - 1;
    this.moments.push(...moments);
    const last = this.moments.length - 1;
    this.slider.max = last;
    this.slider.disabled = this.button.disabled = last < 1;
    if (follow) this.turn(last);
  }

  turn(i) {
    setSlider(this.slider, i);
    this.show(this.moments[i]);
  }

  play() {
    if (Number(this.slider.value) >= this.moments.length - 1) this.turn(0);
    this.button.textContent = "Pause";
    this.timer = setInterval(() => {
      const next = Number(this.slider.value) + 1;
      if (next < this.moments.length) this.turn(next);
      else this.stop();
    }, this.pause);
  }

  stop() {
    clearInterval(this.timer);
    this.timer = 0;
    this.button.textContent = "Play";
  }
}
