// Moments in a row, with a slider through them and a button that plays them.

import { setSlider } from "./dom.js";

export class Film {
  /** show(moment) displays one; label(moment) is what the slider says. */
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

  /** Add a moment; show it if the slider is at the end, as it is while pictures come in. */
  add(moment) {
    const last = this.moments.length - 1;
    const follow = Number(this.slider.value) >= last;
    this.moments.push(moment);
    this.slider.max = last + 1;
    this.slider.disabled = this.button.disabled = this.moments.length < 2;
    if (follow) this.turn(last + 1);
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
