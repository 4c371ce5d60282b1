// What a client writes: one line of JSON for each message that its library handed out.
export const say = (event, data) => {
  let said
  if (!data) {
    said = { empty: event || 'message' }
  } else {
    const message = JSON.parse(data)
    said = message.seq === undefined ? { event, ...message } : { seq: message.seq }
  }
  console.log(JSON.stringify(said))
}

// As a page listens: labels have no event name, news and errors have one.
export const listen = (source) => {
  // A wait before the next try does not keep Node running.
  setInterval(() => {}, 60_000)
  for (const kind of ['message', 'info', 'error']) {
    source.addEventListener(kind, (event) => {
      // The library's own errors have no data.
      if (kind === 'error' && event.data === undefined) console.error(event.message, event.code)
      else say(kind, event.data)
    })
  }
}
