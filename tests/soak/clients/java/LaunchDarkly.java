// LaunchDarkly's okhttp-eventsource; it comes back by itself.
import com.launchdarkly.eventsource.ConnectStrategy;
import com.launchdarkly.eventsource.ErrorStrategy;
import com.launchdarkly.eventsource.EventSource;
import com.launchdarkly.eventsource.MessageEvent;
import java.net.URI;
import java.util.concurrent.TimeUnit;

public class LaunchDarkly {
  public static void main(String[] arguments) {
    ConnectStrategy connect = ConnectStrategy.http(URI.create(System.getenv("URL")))
        .readTimeout(60, TimeUnit.SECONDS);
    EventSource source = new EventSource.Builder(connect)
        .errorStrategy(ErrorStrategy.alwaysContinue())
        .retryDelay(500, TimeUnit.MILLISECONDS)
        .build();
    for (MessageEvent event : source.messages()) Say.message(event.getEventName(), event.getData());
  }
}
