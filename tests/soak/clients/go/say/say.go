// Package say writes one line of JSON for each message that a library handed out.
package say

import (
	"encoding/json"
	"fmt"
	"os"
)

// Message writes a label's seq, the name of another event, or that a message had no data.
func Message(event, data string) {
	said := map[string]any{"empty": event}
	if data != "" {
		message := map[string]any{}
		if err := json.Unmarshal([]byte(data), &message); err != nil {
			fmt.Fprintln(os.Stderr, err, data)
			os.Exit(1)
		}
		if seq, ok := message["seq"]; ok {
			said = map[string]any{"seq": seq}
		} else {
			message["event"] = event
			said = message
		}
	}
	line, _ := json.Marshal(said)
	fmt.Println(string(line))
}
