// github.com/tmaxmax/go-sse; it comes back by itself.
package main

import (
	"log"
	"net/http"
	"os"

	"github.com/tmaxmax/go-sse"

	"sse_labels_clients/say"
)

func main() {
	request, err := http.NewRequest(http.MethodGet, os.Getenv("URL"), nil)
	if err != nil {
		log.Fatal(err)
	}
	connection := sse.NewConnection(request)
	connection.SubscribeToAll(func(event sse.Event) { say.Message(event.Type, event.Data) })
	log.Fatal(connection.Connect())
}
