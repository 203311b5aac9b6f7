"use strict";
(() => {
  const root = document.documentElement;
  const stored = { get: () => { try { return localStorage.getItem("theme"); } catch { return null; } },
                   set: (value) => { try { localStorage.setItem("theme", value); } catch { /* private window */ } } };
  const system = matchMedia("(prefers-color-scheme: dark)");
  if (stored.get()) root.dataset.theme = stored.get();
  document.getElementById("theme").addEventListener("click", () => {
    const dark = (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
    root.dataset.theme = dark ? "light" : "dark";
    stored.set(root.dataset.theme);
  });

  const box = document.getElementById("lightbox");
  const picture = box.querySelector("img"), caption = box.querySelector("p");
  let images = [], index = 0;
  const show = (position) => {
    index = (position + images.length) % images.length;
    picture.src = images[index].src;
    picture.alt = images[index].alt;
    caption.textContent = images[index].alt;
    picture.classList.toggle("tiny", images[index].naturalWidth < 400);
  };
  document.querySelectorAll(".zoom").forEach((button) => button.addEventListener("click", () => {
    images = [...button.closest("section").querySelectorAll(".gallery img")];
    box.classList.toggle("single", images.length < 2);
    show(images.indexOf(button.querySelector("img")));
    box.showModal();
  }));
  box.querySelector(".previous").addEventListener("click", () => show(index - 1));
  box.querySelector(".next").addEventListener("click", () => show(index + 1));
  box.addEventListener("click", (event) => { if (event.target === box) box.close(); });
  box.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") show(index - 1);
    if (event.key === "ArrowRight") show(index + 1);
  });

  // A picture that cannot be shown says so on the page instead of leaving a hole.
  addEventListener("load", () => {
    const all = [...document.querySelectorAll(".gallery img")];
    const broken = all.filter((image) => image.naturalWidth === 0);
    broken.forEach((image) => image.closest("figure").classList.add("broken"));
    root.dataset.images = String(all.length);
    root.dataset.brokenImages = String(broken.length);
  });
})();
