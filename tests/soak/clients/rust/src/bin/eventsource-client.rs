//! LaunchDarkly's `eventsource-client`; it comes back by itself.

use std::{env, time::Duration};

use eventsource_client::{Client, ClientBuilder, ReconnectOptions, SSE};
use futures::StreamExt;
use launchdarkly_sdk_transport::HyperTransport;
use sse_labels_clients::say;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let again = ReconnectOptions::reconnect(true)
        .retry_initial(true)
        .delay(Duration::from_millis(500))
        .delay_max(Duration::from_secs(5))
        .build();
    let client = ClientBuilder::for_url(&env::var("URL").unwrap())
        .unwrap()
        .reconnect(again)
        .build_with_transport(HyperTransport::new().unwrap());
    let mut stream = client.stream();
    while let Some(event) = stream.next().await {
        match event {
            Ok(SSE::Event(event)) => say(&event.event_type, &event.data),
            Ok(_) => {}
            Err(error) => eprintln!("{error}"),
        }
    }
}
