// Writes one line of JSON for each message that a library handed out: a label's seq, the name of
// another event, or that a message had no data.
import java.util.regex.Matcher;
import java.util.regex.Pattern;

class Say {
  private static final Pattern SEQ = Pattern.compile("^\\{\"seq\":(\\d+),");

  static synchronized void message(String event, String data) {
    Matcher seq = SEQ.matcher(data);
    if (data.isEmpty()) System.out.println("{\"empty\":\"" + event + "\"}");
    else if (seq.find()) System.out.println("{\"seq\":" + seq.group(1) + "}");
    else System.out.println(data);
    System.out.flush();
  }
}
