// A browser starts no Worker for a page that is opened from a folder. There, the search's runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.onmessage = this.onerror = this.onmessageerror = null;
      this.waiting = []; // what is sent before the script has been read
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.documentElement.append(this.frame);
      this.frame.received = (data) => this.tell("message", { data });
      const { contentDocument: page, contentWindow: inside } = this.frame;
      page.open();
      page.write("<script>postMessage = (data) => frameElement.received(structuredClone(data))</script>");
      page.write(`<script src="${String(url).replaceAll('"', "%22")}"></script>`);
      this.frame.onload = () => {
        for (const data of this.waiting.splice(0)) this.send(inside, data);
        this.waiting = null;
      };
      inside.onerror = (message) => this.tell("error", { message });
      page.close();
    }

    tell(type, fields) {
      const event = Object.assign(new Event(type), fields);
      setTimeout(() => {
        this[`on${type}`]?.(event);
        this.dispatchEvent(event);
      });
    }

    send(inside, data) {
      inside.dispatchEvent(new inside.MessageEvent("message", { data: structuredClone(data) }));
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data);
      else if (this.frame.contentWindow) this.send(this.frame.contentWindow, data);
    }

    terminate() {
      this.frame.remove();
    }
  };
}
