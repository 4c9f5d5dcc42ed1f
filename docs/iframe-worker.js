// A page opened from the disk may not start a worker, and the search is one. There it runs in a hidden frame instead.
// (The site's builder would load a script of this name from another server; this one is in its place.)
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = "<!doctype html><body></body>";
      this.ready = new Promise((resolve) => {
        frame.onload = () => {
          const inside = frame.contentWindow;
          inside.postMessage = (data) => this.tell("message", new MessageEvent("message", { data }));
          const script = inside.document.createElement("script");
          script.src = new URL(url, document.baseURI).href;
          script.onload = () => resolve(inside);
          script.onerror = () => this.tell("error", new Event("error", { cancelable: true }));
          inside.document.body.append(script);
        };
      });
      document.body.append(frame);
    }

    tell(name, event) {
      this[`on${name}`]?.(event);
      this.dispatchEvent(event);
    }

    postMessage(data) {
      this.ready.then((inside) => inside.onmessage({ data }));
    }

    terminate() {}
  };
}
