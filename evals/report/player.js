"use strict";
(() => {
  const player = document.querySelector(".player");
  if (!player) return;
  const videos = [...document.querySelectorAll("video[data-mp4]")];
  const [play, back, next] = ["play", "back", "next"].map((name) => player.querySelector(`[data-action=${name}]`));
  const slider = player.querySelector("input");
  const output = player.querySelector("output");
  const speed = player.querySelector("select");
  const fps = Number(player.dataset.fps);
  const leader = videos[0];
  let playing = false;
  let rewinding = false;

  for (const video of videos) {
    // Blobs rather than data addresses: not every browser can seek in those.
    const bytes = Uint8Array.from(atob(video.dataset.mp4), (c) => c.charCodeAt(0));
    video.removeAttribute("data-mp4");
    video.src = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
  }

  const last = () => Math.max(0, Math.round(leader.duration * fps) - 1);
  const frame = () => Math.min(last(), Math.floor(leader.currentTime * fps + 0.01));
  const show = () => {
    slider.value = frame();
    output.textContent = `frame ${frame() + 1} of ${last() + 1}`;
  };
  // The middle of a frame, so that rounding cannot show its neighbour.
  const seek = (n) => {
    const wanted = Math.min(Math.max(n, 0), last());
    for (const video of videos) video.currentTime = (wanted + 0.5) / fps;
    slider.value = wanted;
    output.textContent = `frame ${wanted + 1} of ${last() + 1}`;
  };
  const pause = () => {
    playing = false;
    play.textContent = "Play";
    for (const video of videos) video.pause();
  };
  const startAll = () => {
    for (const video of videos) {
      video.playbackRate = Number(speed.value);
      video.play().catch(pause);
    }
  };
  // All wait for the slowest, so that they set off together.
  const rewind = async () => {
    rewinding = true;
    for (const video of videos) video.pause();
    const ready = videos.map((video) => new Promise((done) => video.addEventListener("seeked", done, { once: true })));
    for (const video of videos) video.currentTime = 0;
    await Promise.all(ready);
    rewinding = false;
    if (playing) startAll();
  };
  const run = () => {
    playing = true;
    play.textContent = "Pause";
    if (leader.ended || frame() >= last()) rewind();
    else startAll();
    requestAnimationFrame(tick);
  };
  const tick = () => {
    if (!playing) return;
    if (!rewinding) {
      if (leader.ended) rewind();
      for (const video of videos) {
        const behind = Math.abs(video.currentTime - leader.currentTime) > 0.5 / fps;
        if (behind && !video.seeking && !video.ended) video.currentTime = leader.currentTime;
      }
      show();
    }
    requestAnimationFrame(tick);
  };

  play.addEventListener("click", () => (playing ? pause() : run()));
  back.addEventListener("click", () => { pause(); seek(frame() - 1); });
  next.addEventListener("click", () => { pause(); seek(frame() + 1); });
  slider.addEventListener("input", () => { pause(); seek(Number(slider.value)); });
  speed.addEventListener("change", () => { for (const video of videos) video.playbackRate = Number(speed.value); });
  const ready = () => {
    slider.max = last();
    show();
  };
  if (leader.readyState >= 1) ready();
  else leader.addEventListener("loadedmetadata", ready);

  // Starts by itself once, when the clips come into view, unless the reader asked for less motion.
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) {
    const observer = new IntersectionObserver((entries) => {
      if (entries.some((entry) => entry.isIntersecting)) {
        observer.disconnect();
        run();
      }
    }, { threshold: 0.4 });
    observer.observe(leader);
  }
})();
