// github.com/launchdarkly/eventsource; it comes back by itself.
package main

import (
	"log"
	"os"
	"time"

	"github.com/launchdarkly/eventsource"

	"sse_labels_clients/say"
)

func main() {
	again := func(err error) eventsource.StreamErrorHandlerResult {
		log.Print(err)
		return eventsource.StreamErrorHandlerResult{}
	}
	stream, err := eventsource.SubscribeWithURL(os.Getenv("URL"),
		eventsource.StreamOptionInitialRetry(500*time.Millisecond),
		eventsource.StreamOptionCanRetryFirstConnection(-1),
		eventsource.StreamOptionErrorHandler(again))
	if err != nil {
		log.Fatal(err)
	}
	for event := range stream.Events {
		say.Message(event.Event(), event.Data())
	}
}
