//! Writes one line of JSON for each message that a library handed out.

use serde_json::{json, Value};

/// Writes a label's seq, the name of another event, or that a message had no data.
pub fn say(event: &str, data: &str) {
    let said = if data.is_empty() {
        json!({ "empty": event })
    } else {
        let mut message: Value = serde_json::from_str(data).expect("JSON");
        match message.get("seq") {
            Some(seq) => json!({ "seq": seq }),
            None => {
                message["event"] = json!(event);
                message
            }
        }
    };
    println!("{said}");
}
