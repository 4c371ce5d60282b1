// okhttp-sse; it parses, and coming back is the caller's to do. Its read time-out is 10 s by default,
// which is shorter than the heartbeat.
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import okhttp3.OkHttpClient;
import okhttp3.Request;
import okhttp3.Response;
import okhttp3.sse.EventSource;
import okhttp3.sse.EventSourceListener;
import okhttp3.sse.EventSources;

public class OkHttpSse {
  static volatile String lastId = "";

  public static void main(String[] arguments) throws InterruptedException {
    OkHttpClient client = new OkHttpClient.Builder().readTimeout(60, TimeUnit.SECONDS).build();
    while (true) {
      CountDownLatch ended = new CountDownLatch(1);
      Request.Builder request = new Request.Builder().url(System.getenv("URL"));
      if (!lastId.isEmpty()) request.header("Last-Event-ID", lastId);
      EventSources.createFactory(client).newEventSource(request.build(), new EventSourceListener() {
        @Override public void onEvent(EventSource source, String id, String type, String data) {
          if (id != null) lastId = id;
          Say.message(type, data);
        }
        @Override public void onClosed(EventSource source) { ended.countDown(); }
        @Override public void onFailure(EventSource source, Throwable error, Response response) {
          ended.countDown();
        }
      });
      ended.await();
      Thread.sleep(500);
    }
  }
}
