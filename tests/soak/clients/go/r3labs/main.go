// github.com/r3labs/sse; it takes a clean end for final, so that the caller begins again.
package main

import (
	"log"
	"os"
	"time"

	"github.com/r3labs/sse/v2"

	"sse_labels_clients/say"
)

func main() {
	client := sse.NewClient(os.Getenv("URL"))
	for {
		err := client.SubscribeRaw(func(event *sse.Event) {
			say.Message(string(event.Event), string(event.Data))
		})
		log.Print(err)
		time.Sleep(500 * time.Millisecond)
	}
}
