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
    const image = images[index];
    picture.src = image.src;
    picture.alt = caption.textContent = image.alt;
    picture.classList.toggle("tiny", Number(image.getAttribute("width")) < 400);
    picture.classList.toggle("wide", image.closest("figure").classList.contains("strip"));
  };
  document.querySelectorAll(".zoom").forEach((link) => link.addEventListener("click", (event) => {
    event.preventDefault();
    images = [...link.closest("section").querySelectorAll(".gallery img")];
    box.classList.toggle("single", images.length < 2);
    show(images.indexOf(link.querySelector("img")));
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
  document.querySelectorAll(".gallery img").forEach((image) => {
    const broken = () => image.closest("figure").classList.add("broken");
    image.addEventListener("error", broken);
    if (image.complete && image.naturalWidth === 0 && image.currentSrc) broken();
  });

  // The contents show where one is.
  const links = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => entries.forEach(({ isIntersecting, target }) => {
    if (!isIntersecting) return;
    links.forEach((link, id) => link.toggleAttribute("aria-current", id === target.id));
    const here = links.get(target.id), bar = here.parentElement;
    bar.scrollTo({ left: here.offsetLeft - bar.clientWidth / 2 });
  }), { rootMargin: "-20% 0px -75% 0px" });
  document.querySelectorAll("main > section[id]").forEach((section) => links.has(section.id) && seen.observe(section));
})();
