// Unpacks the page's modules and starts the viewer. Modules find each other by name through an import map of blobs.
(async () => {
  const said = document.getElementById("status");
  window.addEventListener("error", (event) => { said.textContent = `This page cannot be shown: ${event.message}`; });
  window.unpack = async (element) => {
    const bytes = Uint8Array.from(atob(element.textContent.trim()), (letter) => letter.charCodeAt(0));
    element.textContent = "";
    return new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  };
  try {
    const probe = document.createElement("canvas").getContext("webgl2");
    if (!probe) throw new Error("this browser has no WebGL 2, or it is switched off");
    probe.getExtension("WEBGL_lose_context")?.loseContext();
    const imports = {};
    for (const element of document.querySelectorAll("script[data-module]")) {
      const text = await new Response(await window.unpack(element)).text();
      imports[element.dataset.module] = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
    }
    const map = document.createElement("script");
    map.type = "importmap";
    map.textContent = JSON.stringify({ imports });
    document.head.append(map);
    await import(imports.viewer);
  } catch (error) {
    said.textContent = `This page cannot be shown: ${error.message}`;
    throw error;
  }
})();
