//! `reqwest-eventsource`; it comes back by itself, except after a status or type that it refuses.

use std::env;

use futures::StreamExt;
use reqwest_eventsource::{Event, EventSource, ReadyState};
use sse_labels_clients::say;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut source = EventSource::get(env::var("URL").unwrap());
    while let Some(event) = source.next().await {
        match event {
            Ok(Event::Open) => {}
            Ok(Event::Message(message)) => say(&message.event, &message.data),
            Err(error) => {
                eprintln!("{error}");
                if source.ready_state() == ReadyState::Closed {
                    break;
                }
            }
        }
    }
}
